// The service around sessions: queue, workers that come and go, draining, the other calls.

#include <gmock/gmock.h>

#include <thread>

#include "absl/time/clock.h"
#include "tests/router/session_fixture.h"

namespace winnow::router {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using winnow::testing::FakeWorker;
using winnow::testing::Tokens;

using InferenceServiceTest = SessionTest;

TEST_F(InferenceServiceTest, QueueIsBoundedAndInOrder) {
  std::atomic<bool> go{false};
  HoldPrefillUntil(go);
  StartPair(/*max_running=*/1, /*max_waiting=*/1);
  Outcome first;
  Outcome second;
  std::thread a([&] { first = Generate(Request()); });
  while (prefill_.prefill_requests().empty()) absl::SleepFor(absl::Milliseconds(1));
  std::thread b([&] { second = Generate(Request()); });
  while (admission_->waiting() < 1) absl::SleepFor(absl::Milliseconds(1));
  const Outcome third = Generate(Request());
  EXPECT_EQ(third.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(third.status), v1::ERROR_REASON_QUEUE_FULL);
  EXPECT_GT(RetryAfter(third.status), absl::ZeroDuration());
  EXPECT_EQ(prefill_.prefill_requests().size(), 1u);
  go = true;
  a.join();
  b.join();
  EXPECT_TRUE(first.status.ok()) << first.status;
  EXPECT_TRUE(second.status.ok()) << second.status;
}

TEST_F(InferenceServiceTest, SilentWorkerIsNotAliveAndComesBack) {
  StartPair();
  decode_.SetSilent(true);
  absl::SleepFor(WorkerRegistry::kSilence + absl::Milliseconds(500));
  Outcome outcome = Generate(Request());
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(outcome.status), v1::ERROR_REASON_NO_WORKER);
  decode_.SetSilent(false);
  for (int i = 0; i < 500 && registry_->Decode().empty(); ++i)
    absl::SleepFor(absl::Milliseconds(10));
  outcome = Generate(Request());
  EXPECT_TRUE(outcome.status.ok()) << outcome.status;
}

TEST_F(InferenceServiceTest, WorkerThatDiesEndsItsRequestsAndIsFoundAgain) {
  auto worker = std::make_unique<FakeWorker>(v1::WORKER_ROLE_DECODE);
  const int port = worker->port();
  worker->SetDecode(
      [w = worker.get()](auto* context, const auto&, auto*) { return w->WaitCancelled(context); });
  Start({prefill_.target()}, {worker->target()});
  Outcome outcome;
  std::thread client([&] { outcome = Generate(Request()); });
  while (worker->decode_requests().empty()) absl::SleepFor(absl::Milliseconds(5));
  worker.reset();
  client.join();
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kUnavailable) << outcome.status;
  worker = std::make_unique<FakeWorker>(v1::WORKER_ROLE_DECODE, port);
  worker->SetDecode([this](auto*, const auto&, auto* writer) {
    writer->Write(Tokens(1, {hello_.begin() + 1, hello_.end()}, v1::FINISH_REASON_LENGTH, 1));
    return grpc::Status::OK;
  });
  for (int i = 0; i < 500 && registry_->Decode().empty(); ++i)
    absl::SleepFor(absl::Milliseconds(10));
  outcome = Generate(Request());
  EXPECT_TRUE(outcome.status.ok()) << outcome.status;
}

TEST_F(InferenceServiceTest, DrainingWorkersGetNothing) {
  v1::LoadSnapshot draining;
  draining.set_draining(true);
  StartPair();
  prefill_.SetSnapshot(draining);
  for (int i = 0; i < 500 && !registry_->Prefill().empty(); ++i)
    absl::SleepFor(absl::Milliseconds(10));
  const Outcome outcome = Generate(Request());
  EXPECT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(prefill_.prefill_requests().size(), 0u);
  EXPECT_TRUE(decode_.decode_requests().at(0).local_prefill());
}

TEST_F(InferenceServiceTest, DrainWaitsForOpenRequests) {
  StartPair();
  std::atomic<bool> go{false};
  HoldPrefillUntil(go);
  Outcome open;
  std::thread client([&] { open = Generate(Request()); });
  while (admission_->running() < 1) absl::SleepFor(absl::Milliseconds(1));
  std::thread drain(
      [&] { service_->Drain(absl::Now() + absl::Seconds(10), [] { return false; }); });
  absl::SleepFor(absl::Milliseconds(50));
  const Outcome late = Generate(Request());
  EXPECT_EQ(late.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(late.status), v1::ERROR_REASON_DRAINING);
  go = true;
  drain.join();
  client.join();
  EXPECT_TRUE(open.status.ok()) << open.status;
}

TEST_F(InferenceServiceTest, ModelInfoTokenizeDetokenize) {
  v1::LoadSnapshot shorter;
  shorter.set_max_model_len(100);
  decode_.SetSnapshot(shorter);
  StartPair();
  {
    grpc::ClientContext context;
    v1::GetModelInfoResponse info;
    ASSERT_TRUE(stub_->GetModelInfo(&context, {}, &info).ok());
    EXPECT_EQ(info.architecture(), "llama");
    EXPECT_EQ(info.kv_mode(), "dense-fp8");
    EXPECT_EQ(info.max_model_len(), 100);
    EXPECT_EQ(info.vocab_size(), 259);
    EXPECT_TRUE(info.chat());
    EXPECT_EQ(info.default_sampling().temperature(), 0.0f);
  }
  {
    grpc::ClientContext context;
    v1::TokenizeRequest request;
    request.set_text("hello world");
    v1::TokenizeResponse response;
    ASSERT_TRUE(stub_->Tokenize(&context, request, &response).ok());
    EXPECT_THAT(response.token_ids(), ElementsAreArray(hello_));
  }
  {
    grpc::ClientContext context;
    v1::DetokenizeRequest request;
    request.mutable_token_ids()->Assign(hello_.begin(), hello_.end());
    v1::DetokenizeResponse response;
    ASSERT_TRUE(stub_->Detokenize(&context, request, &response).ok());
    EXPECT_EQ(response.text(), "hello world");
  }
  {
    grpc::ClientContext context;
    v1::DetokenizeRequest request;
    request.add_token_ids(100000);
    v1::DetokenizeResponse response;
    const grpc::Status status = stub_->Detokenize(&context, request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(ReasonOf(FromGrpcStatus(status)), v1::ERROR_REASON_INVALID_FIELD);
  }
}

TEST_F(InferenceServiceTest, RequestErrorsCarryAReason) {
  StartPair();
  v1::GenerateRequest request = Request(0);
  const Outcome outcome = Generate(request);
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReasonOf(outcome.status), v1::ERROR_REASON_INVALID_FIELD);
  EXPECT_TRUE(prefill_.prefill_requests().empty());
  EXPECT_THAT(metrics_registry_->Render(),
              HasSubstr("winnow_requests_total{code=\"INVALID_ARGUMENT\"} 1"));
}

}  // namespace
}  // namespace winnow::router
