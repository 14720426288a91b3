#include "decode_worker/decode_service.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "common/base/mutex.h"
#include "common/rpc/grpc_status.h"

namespace winnow::decode {
namespace {

// Emits max_tokens tokens 100, 101, ... from a thread of its own; with hold = true it
// emits one and then waits to be cancelled.
class FakeEngine final : public DecodeEngine {
 public:
  ~FakeEngine() override {
    Cancel(0);
    for (std::thread& t : threads_) t.join();
  }
  absl::StatusOr<uint64_t> Submit(SequenceRequest r, std::shared_ptr<TokenSink> sink) override {
    if (!refusal.ok()) return refusal;
    last = r;
    threads_.emplace_back([this, r = std::move(r), sink = std::move(sink)] {
      const int first = r.transfer_id.empty() ? 0 : 1;
      for (int i = first; i < r.request.max_tokens; ++i) {
        sink->OnToken(i, 100 + i, {.peak_bytes = 3}, 2);
        if (hold) {
          MutexLock lock(&mu_);
          while (!cancelled_) changed_.Wait(&mu_);
          return sink->OnFailed(absl::CancelledError("the router left"));
        }
      }
      sink->OnFinished(
          FinishReason::kLength,
          {.peak_bytes = 5, .dense_bf16_bytes = 6, .live_tokens = 7, .logical_tokens = 8}, 9);
    });
    return 1;
  }
  void Cancel(uint64_t) override {
    MutexLock lock(&mu_);
    cancelled_ = true;
    changed_.NotifyAll();
  }

  absl::Status refusal;
  std::atomic<bool> hold = false;
  SequenceRequest last;

 private:
  Mutex mu_;
  CondVar changed_;
  bool cancelled_ = false;
  std::vector<std::thread> threads_;
};

class DecodeServiceTest : public testing::Test {
 protected:
  DecodeServiceTest() : service_(&engine_) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    stub_ = v1::Decode::NewStub(grpc::CreateChannel("127.0.0.1:" + std::to_string(port),
                                                    grpc::InsecureChannelCredentials()));
    request_.set_transfer_id(std::string(16, 't'));
    request_.set_request_id("r1");
    request_.add_prompt_ids(7);
    request_.mutable_sampling()->set_max_tokens(1000);
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  }
  ~DecodeServiceTest() override { server_->Shutdown(); }

  grpc::Status Call() {
    auto reader = stub_->Decode(&context_, request_);
    v1::DecodeEvent event;
    while (reader->Read(&event)) events_.push_back(event);
    return reader->Finish();
  }

  FakeEngine engine_;
  DecodeService service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::Decode::Stub> stub_;
  grpc::ClientContext context_;
  v1::DecodeRequest request_;
  std::vector<v1::DecodeEvent> events_;
};

TEST_F(DecodeServiceTest, StreamsEveryTokenInOrderWithItsUsage) {
  request_.mutable_sampling()->add_stop_token_ids(3);
  const grpc::Status status = Call();
  EXPECT_TRUE(status.ok()) << status.error_message();
  int next = 1;  // the prefill worker sent the first
  for (const v1::DecodeEvent& event : events_) {
    EXPECT_EQ(event.first_index(), next);
    for (int32_t token : event.token_ids()) ASSERT_EQ(token, 100 + next++);
  }
  EXPECT_EQ(next, 1000);
  ASSERT_GT(events_.size(), 1u);
  EXPECT_EQ(events_.front().kv().peak_bytes(), 3u);
  EXPECT_EQ(events_.front().kv().transferred_bytes(), 2u);
  const v1::DecodeEvent& last = events_.back();
  EXPECT_EQ(last.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(last.kv().peak_bytes(), 5u);
  EXPECT_EQ(last.kv().transferred_bytes(), 9u);
  EXPECT_EQ(engine_.last.request.stop_token_ids, std::vector<int32_t>{3});
  EXPECT_EQ(engine_.last.transfer_id, std::string(16, 't'));
}

TEST_F(DecodeServiceTest, LocalPrefillStartsAtIndexZero) {
  request_.clear_transfer_id();
  request_.set_local_prefill(true);
  EXPECT_TRUE(Call().ok());
  ASSERT_FALSE(events_.empty());
  EXPECT_EQ(events_[0].first_index(), 0);
}

TEST_F(DecodeServiceTest, RefusesBadFieldsByName) {
  request_.set_transfer_id("short");
  grpc::Status status = Call();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(status.error_message().find("transfer_id of 5 bytes"), std::string::npos);
  EXPECT_EQ(ReasonOf(FromGrpcStatus(status)), v1::ERROR_REASON_INVALID_FIELD);

  v1::DecodeRequest request = request_;
  request.set_transfer_id(std::string(16, 't'));
  EXPECT_TRUE(ValidateDecode(request).ok());
  request.clear_prompt_ids();
  EXPECT_EQ(ValidateDecode(request).message(), "prompt_ids is empty");
  request = request_;
  request.clear_sampling();
  EXPECT_EQ(ValidateDecode(request).message(), "sampling is unset");
  request = request_;
  request.set_request_id(std::string(129, 'r'));
  EXPECT_FALSE(ValidateDecode(request).ok());
}

TEST_F(DecodeServiceTest, PassesOnARefusalWithItsReason) {
  engine_.refusal = WithReason(absl::ResourceExhaustedError("queue is full"),
                               v1::ERROR_REASON_QUEUE_FULL, absl::Seconds(1));
  const grpc::Status status = Call();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(ReasonOf(FromGrpcStatus(status)), v1::ERROR_REASON_QUEUE_FULL);
  EXPECT_EQ(RetryAfter(FromGrpcStatus(status)), absl::Seconds(1));
}

TEST_F(DecodeServiceTest, ClientCancelReachesTheEngine) {
  engine_.hold = true;
  auto reader = stub_->Decode(&context_, request_);
  v1::DecodeEvent event;
  ASSERT_TRUE(reader->Read(&event));
  context_.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  // ~FakeEngine would wait for ever otherwise: the thread ends by Cancel().
}

}  // namespace
}  // namespace winnow::decode
