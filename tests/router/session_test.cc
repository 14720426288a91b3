// How a session merges its two legs, ends them, and tries once more.

#include <gmock/gmock.h>

#include "absl/time/clock.h"
#include "tests/router/session_fixture.h"

namespace winnow::router {
namespace {

using ::testing::ElementsAreArray;
using winnow::testing::FakeWorker;
using winnow::testing::FirstToken;
using winnow::testing::Tokens;
using winnow::testing::TransferDone;

constexpr int32_t kEndId = 258;

TEST_F(SessionTest, MergesBothLegsInOrder) {
  StartPair();
  v1::GenerateRequest request = Request();
  request.set_return_prompt_token_ids(true);
  request.mutable_sampling()->set_seed(7);
  const Outcome outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_THAT(outcome.token_ids(), ElementsAreArray(hello_));
  EXPECT_EQ(outcome.text(), "hello world");
  EXPECT_THAT(outcome.responses.front().prompt_token_ids(),
              ElementsAreArray(model_->EncodeText("abc").value()));
  const v1::GenerateResponse& last = outcome.last();
  EXPECT_EQ(last.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(last.stop_reason_case(), v1::GenerateResponse::STOP_REASON_NOT_SET);
  EXPECT_EQ(last.usage().prompt_tokens(), 3);
  EXPECT_EQ(last.usage().completion_tokens(), 11);
  EXPECT_EQ(last.usage().total_tokens(), 14);
  EXPECT_EQ(last.kv().peak_bytes(), 555u);
  EXPECT_EQ(last.kv().transferred_bytes(), 1000u);

  const v1::PrefillRequest prefill = prefill_.prefill_requests().at(0);
  const v1::DecodeRequest decode = decode_.decode_requests().at(0);
  EXPECT_EQ(prefill.transfer_id().size(), 16u);
  EXPECT_EQ(prefill.transfer_id(), decode.transfer_id());
  EXPECT_EQ(prefill.decode_target(), decode_.target());
  EXPECT_EQ(prefill.decode_incarnation(), 42u);
  EXPECT_EQ(prefill.sampling().seed(), 7u);
  EXPECT_THAT(decode.sampling().stop_token_ids(), ::testing::ElementsAre(kEndId));
  EXPECT_FALSE(decode.local_prefill());
}

TEST_F(SessionTest, TokensThatOvertakeTheFirstWait) {
  prefill_.SetPrefill([this](auto*, const auto&, auto* writer) {
    absl::SleepFor(absl::Milliseconds(200));
    writer->Write(FirstToken(hello_[0]));
    writer->Write(TransferDone(1000));
    return grpc::Status::OK;
  });
  StartPair();
  const Outcome outcome = Generate(Request());
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hello world");
  EXPECT_EQ(outcome.last().kv().transferred_bytes(), 1000u);
}

TEST_F(SessionTest, FirstTokenMayEndIt) {
  prefill_.SetPrefill([this](auto*, const auto&, auto* writer) {
    // The call must have arrived there, else nobody sees it cancelled.
    while (decode_.decode_requests().empty()) absl::SleepFor(absl::Milliseconds(1));
    writer->Write(FirstToken(hello_[0], v1::FINISH_REASON_LENGTH));
    return grpc::Status::OK;
  });
  decode_.SetDecode(
      [this](auto* context, const auto&, auto*) { return decode_.WaitCancelled(context); });
  StartPair();
  const Outcome outcome = Generate(Request(1));
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "h");
  EXPECT_EQ(outcome.last().finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(outcome.last().kv().peak_bytes(), 77u);
  EXPECT_EQ(outcome.last().kv().transferred_bytes(), 0u);
  EXPECT_TRUE(decode_.WaitForCancelled(1));
}

TEST_F(SessionTest, StopStringAcrossTokensCancelsBothLegs) {
  prefill_.SetPrefill([this](auto* context, const auto&, auto* writer) {
    writer->Write(FirstToken(hello_[0]));
    return prefill_.WaitCancelled(context);
  });
  decode_.SetDecode([this](auto* context, const auto&, auto* writer) {
    writer->Write(Tokens(1, {hello_.begin() + 1, hello_.begin() + 4}));
    v1::DecodeEvent event = Tokens(4, {hello_.begin() + 4, hello_.end()});
    event.mutable_kv()->set_peak_bytes(321);
    writer->Write(event);
    return decode_.WaitCancelled(context);
  });
  StartPair();
  v1::GenerateRequest request = Request(100);
  request.mutable_sampling()->add_stop("lo w");
  request.mutable_sampling()->add_stop("never");
  const Outcome outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hel");
  EXPECT_THAT(outcome.token_ids(), ElementsAreArray(hello_.begin(), hello_.begin() + 7));
  EXPECT_EQ(outcome.last().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(outcome.last().stop_text(), "lo w");
  EXPECT_EQ(outcome.last().kv().peak_bytes(), 321u);
  EXPECT_EQ(outcome.last().usage().completion_tokens(), 7);
  EXPECT_TRUE(prefill_.WaitForCancelled(1));
  EXPECT_TRUE(decode_.WaitForCancelled(1));
}

TEST_F(SessionTest, TextHeldForAStopStringComesAtTheEnd) {
  StartPair();
  v1::GenerateRequest request = Request();
  request.mutable_sampling()->add_stop("world!");
  const Outcome outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hello world");
  EXPECT_EQ(outcome.last().finish_reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(SessionTest, StopIdIsATokenWithoutText) {
  decode_.SetDecode([this](auto*, const auto&, auto* writer) {
    writer->Write(Tokens(1, {hello_[1], kEndId}, v1::FINISH_REASON_STOP, 5));
    return grpc::Status::OK;
  });
  StartPair();
  v1::GenerateRequest request = Request();
  request.mutable_sampling()->set_skip_special_tokens(false);
  const Outcome outcome = Generate(request);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "he");
  EXPECT_THAT(outcome.token_ids(), ElementsAreArray({hello_[0], hello_[1], kEndId}));
  EXPECT_EQ(outcome.last().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(outcome.last().stop_token_id(), kEndId);
}

TEST_F(SessionTest, WithoutPrefillWorkerTheDecodeWorkerPrefills) {
  Start({}, {decode_.target()});
  const Outcome outcome = Generate(Request());
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hello world");
  EXPECT_TRUE(decode_.decode_requests().at(0).local_prefill());
  EXPECT_EQ(outcome.last().kv().transferred_bytes(), 0u);
}

TEST_F(SessionTest, RetriesOnceOnAnotherDecodeWorker) {
  FakeWorker broken(v1::WORKER_ROLE_DECODE);
  broken.SetDecode([](auto*, const auto&, auto*) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  });
  // Slow, so that the decode leg fails before a token was sent.
  prefill_.SetPrefill([this](auto* context, const auto&, auto* writer) {
    for (int i = 0; i < 20 && !context->IsCancelled(); ++i) absl::SleepFor(absl::Milliseconds(10));
    writer->Write(FirstToken(hello_[0]));
    writer->Write(TransferDone(1000));
    return grpc::Status::OK;
  });
  Start({prefill_.target()}, {broken.target(), decode_.target()});
  for (int i = 0; i < 2; ++i) {  // the rotation begins with either
    const Outcome outcome = Generate(Request());
    ASSERT_TRUE(outcome.status.ok()) << outcome.status;
    EXPECT_EQ(outcome.text(), "hello world");
  }
  EXPECT_GE(broken.decode_requests().size(), 1u);
  EXPECT_EQ(decode_.decode_requests().size(), 2u);
  EXPECT_GE(metrics_->retries->Value(), 1.0);
  EXPECT_NE(broken.decode_requests()[0].transfer_id(), decode_.decode_requests()[1].transfer_id());
}

TEST_F(SessionTest, NoRetryOnceATokenWasSent) {
  FakeWorker other(v1::WORKER_ROLE_DECODE);
  for (FakeWorker* worker : {&other, &decode_}) {
    worker->SetDecode([this](auto*, const auto&, auto* writer) {
      writer->Write(Tokens(1, {hello_[1]}));
      absl::SleepFor(absl::Milliseconds(100));
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
    });
  }
  Start({prefill_.target()}, {other.target(), decode_.target()});
  const Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(other.decode_requests().size() + decode_.decode_requests().size(), 1u);
}

}  // namespace
}  // namespace winnow::router
