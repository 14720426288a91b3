// Workers that fail, clients that leave, deadlines that pass: no leg is left behind.

#include <gmock/gmock.h>

#include "absl/time/clock.h"
#include "tests/router/session_fixture.h"

namespace winnow::router {
namespace {

using ::testing::HasSubstr;
using winnow::testing::FakeWorker;
using winnow::testing::FirstToken;
using winnow::testing::Tokens;

TEST_F(SessionTest, WithoutDecodeWorkerUnavailable) {
  Start({prefill_.target()}, {});
  const Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(outcome.status), v1::ERROR_REASON_NO_WORKER);
}

// One leg fails at one point; what the client then sees, and that the other leg ends.
struct FailureCase {
  const char* name;
  bool prefill_fails;  // else decode
  bool after_first_token;
  grpc::StatusCode code;  // OK: ends early without what was due
  absl::StatusCode seen;
};

void PrintTo(const FailureCase& c, std::ostream* os) { *os << c.name; }

class SessionFailureTest : public SessionTest, public ::testing::WithParamInterface<FailureCase> {};

TEST_P(SessionFailureTest, EndsBothLegs) {
  const FailureCase& c = GetParam();
  prefill_.SetPrefill([&](auto* context, const auto&, auto* writer) {
    if (c.after_first_token || !c.prefill_fails) writer->Write(FirstToken(hello_[0]));
    if (c.prefill_fails) {
      for (int i = 0; i < 500 && decode_.decode_requests().empty(); ++i) {
        absl::SleepFor(absl::Milliseconds(10));
      }
      return grpc::Status(c.code, "scripted");
    }
    return prefill_.WaitCancelled(context);
  });
  decode_.SetDecode([&](auto* context, const auto&, auto* writer) {
    if (c.prefill_fails) return decode_.WaitCancelled(context);
    // A leg that is cancelled before it was sent never reaches its worker.
    for (int i = 0; i < 500 && prefill_.prefill_requests().empty(); ++i) {
      absl::SleepFor(absl::Milliseconds(10));
    }
    if (c.after_first_token) {
      writer->Write(Tokens(1, {hello_[1]}));
      absl::SleepFor(absl::Milliseconds(100));
    }
    return grpc::Status(c.code, "scripted");
  });
  StartPair();
  const absl::Time start = absl::Now();
  const Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), c.seen) << outcome.status;
  EXPECT_NE(ReasonOf(outcome.status), v1::ERROR_REASON_UNSPECIFIED);
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  EXPECT_TRUE((c.prefill_fails ? decode_ : prefill_).WaitForCancelled(1));
  // No second worker: no second try.
  EXPECT_EQ(prefill_.prefill_requests().size(), 1u);
  EXPECT_EQ(decode_.decode_requests().size(), 1u);
}

INSTANTIATE_TEST_SUITE_P(
    Points, SessionFailureTest,
    ::testing::Values(
        FailureCase{"PrefillUnavailableFirst", true, false, grpc::StatusCode::UNAVAILABLE,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillExhaustedFirst", true, false, grpc::StatusCode::RESOURCE_EXHAUSTED,
                    absl::StatusCode::kResourceExhausted},
        FailureCase{"PrefillLayoutDiffers", true, false, grpc::StatusCode::FAILED_PRECONDITION,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillInternalFirst", true, false, grpc::StatusCode::INTERNAL,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillEndsWithoutToken", true, false, grpc::StatusCode::OK,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillLostInTransfer", true, true, grpc::StatusCode::UNAVAILABLE,
                    absl::StatusCode::kUnavailable},
        FailureCase{"PrefillDataLoss", true, true, grpc::StatusCode::DATA_LOSS,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeUnavailable", false, false, grpc::StatusCode::UNAVAILABLE,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeExhausted", false, false, grpc::StatusCode::RESOURCE_EXHAUSTED,
                    absl::StatusCode::kResourceExhausted},
        FailureCase{"DecodeTransferTimeout", false, false, grpc::StatusCode::DEADLINE_EXCEEDED,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeCancelledByItself", false, true, grpc::StatusCode::CANCELLED,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeEndsWithoutReason", false, true, grpc::StatusCode::OK,
                    absl::StatusCode::kUnavailable},
        FailureCase{"DecodeLostInTheMiddle", false, true, grpc::StatusCode::UNAVAILABLE,
                    absl::StatusCode::kUnavailable}),
    [](const auto& param) { return param.param.name; });

TEST_F(SessionTest, PrefillLostAfterTheTransferDoesNotMatter) {
  prefill_.SetPrefill([this](auto*, const auto&, auto* writer) {
    writer->Write(FirstToken(hello_[0]));
    absl::SleepFor(absl::Milliseconds(100));
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
  });
  decode_.SetDecode([this](auto*, const auto&, auto* writer) {
    writer->Write(Tokens(1, {hello_.begin() + 1, hello_.begin() + 5}));
    absl::SleepFor(absl::Milliseconds(300));
    writer->Write(Tokens(5, {hello_.begin() + 5, hello_.end()}, v1::FINISH_REASON_LENGTH, 1));
    return grpc::Status::OK;
  });
  StartPair();
  const Outcome outcome = Generate(Request());
  EXPECT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.text(), "hello world");
}

TEST_F(SessionTest, DecodeTokensOutOfOrderAreRefused) {
  decode_.SetDecode([this](auto*, const auto&, auto* writer) {
    writer->Write(Tokens(2, {hello_[2]}, v1::FINISH_REASON_LENGTH));
    return grpc::Status::OK;
  });
  StartPair();
  const Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(outcome.status.message()), HasSubstr("expected from 1"));
}

TEST_F(SessionTest, ClientThatLeavesEndsBothLegs) {
  prefill_.SetPrefill([this](auto* context, const auto&, auto* writer) {
    writer->Write(FirstToken(hello_[0]));
    return prefill_.WaitCancelled(context);
  });
  decode_.SetDecode(
      [this](auto* context, const auto&, auto*) { return decode_.WaitCancelled(context); });
  StartPair();
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Request());
  v1::GenerateResponse response;
  ASSERT_TRUE(reader->Read(&response));
  // The first token comes from the prefill worker: the decode leg may still be on its way, and a
  // call that is cancelled before its handler runs is never seen to be cancelled.
  for (int i = 0; i < 500 && decode_.decode_requests().empty(); ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  ASSERT_EQ(decode_.decode_requests().size(), 1u);
  context.TryCancel();
  while (reader->Read(&response)) continue;
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(prefill_.WaitForCancelled(1));
  EXPECT_TRUE(decode_.WaitForCancelled(1));
}

TEST_F(SessionTest, DeadlineEndsBothLegs) {
  HangBothLegs();
  StartPair();
  // On a busy host a deadline may pass before a worker has seen its leg: then a longer one.
  for (absl::Duration deadline = absl::Milliseconds(300); deadline < absl::Seconds(20);
       deadline *= 4) {
    const absl::Time start = absl::Now();
    const Outcome outcome = Generate(Request(), deadline);
    EXPECT_EQ(outcome.status.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_LT(absl::Now() - start, deadline + absl::Seconds(3));
    if (!prefill_.prefill_requests().empty() && !decode_.decode_requests().empty()) break;
  }
  EXPECT_TRUE(prefill_.WaitForCancelled(1));
  EXPECT_TRUE(decode_.WaitForCancelled(1));
}

// A deadline that passes while legs are being opened: each leg that a worker saw begin, it sees
// end.
TEST_F(SessionTest, DeadlineAtAnyMomentLeavesNoLegBehind) {
  HangBothLegs();
  StartPair();
  for (int i = 0; i < 60; ++i) {
    EXPECT_FALSE(Generate(Request(), absl::Microseconds(200 + 150 * i)).status.ok());
  }
  for (FakeWorker* worker : {&prefill_, &decode_}) {
    const auto begun = worker->prefill_requests().size() + worker->decode_requests().size();
    EXPECT_TRUE(worker->WaitForCancelled(static_cast<int>(begun))) << begun;
  }
}

}  // namespace
}  // namespace winnow::router
