#include "common/worker/worker_service.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "absl/time/clock.h"

namespace winnow {
namespace {

class WorkerServiceTest : public testing::Test {
 protected:
  WorkerServiceTest()
      : service_({.snapshot =
                      [this] {
                        v1::LoadSnapshot snapshot;
                        snapshot.set_running(running_);
                        snapshot.set_draining(draining_);
                        return snapshot;
                      },
                  .start_draining = [this] { draining_ = true; },
                  .open_requests = [this] { return running_.load(); }}) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    stub_ = v1::Worker::NewStub(grpc::CreateChannel("127.0.0.1:" + std::to_string(port),
                                                    grpc::InsecureChannelCredentials()));
    ticker_ = std::thread([this] {
      while (!stop_) {
        service_.Tick();
        absl::SleepFor(absl::Milliseconds(20));
      }
    });
  }
  ~WorkerServiceTest() override {
    service_.CloseWatches();
    stop_ = true;
    ticker_.join();
    server_->Shutdown();
  }

  std::atomic<int> running_{0};
  std::atomic<bool> draining_{false};
  std::atomic<bool> stop_{false};
  WorkerService service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::Worker::Stub> stub_;
  std::thread ticker_;
};

TEST_F(WorkerServiceTest, WatchShowsTheStateAtOnceEachChangeAndAHeartbeat) {
  running_ = 3;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  auto reader = stub_->WatchLoad(&context, {});
  v1::LoadSnapshot snapshot;
  ASSERT_TRUE(reader->Read(&snapshot));
  EXPECT_EQ(snapshot.running(), 3);
  running_ = 4;
  const absl::Time changed = absl::Now();
  ASSERT_TRUE(reader->Read(&snapshot));
  EXPECT_EQ(snapshot.running(), 4);
  EXPECT_LT(absl::Now() - changed, absl::Milliseconds(400));
  const absl::Time shown = absl::Now();
  ASSERT_TRUE(reader->Read(&snapshot));  // nothing changed: the heartbeat
  EXPECT_GT(absl::Now() - shown, absl::Milliseconds(100));
  EXPECT_LT(absl::Now() - shown, absl::Seconds(1));
  service_.CloseWatches();
  while (reader->Read(&snapshot)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  // Nor does one that comes later hold up the shutdown.
  grpc::ClientContext late;
  auto refused = stub_->WatchLoad(&late, {});
  EXPECT_FALSE(refused->Read(&snapshot));
  EXPECT_EQ(refused->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(WorkerServiceTest, DrainReturnsWhenTheLastRequestHasEnded) {
  running_ = 1;
  std::atomic<bool> returned = false;
  std::thread drain([&] {
    grpc::ClientContext context;
    v1::DrainResponse response;
    EXPECT_TRUE(stub_->Drain(&context, {}, &response).ok());
    returned = true;
  });
  while (!draining_) absl::SleepFor(absl::Milliseconds(1));
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_FALSE(returned);
  running_ = 0;
  drain.join();
}

TEST_F(WorkerServiceTest, DrainEndsAtItsDeadlineAndTheWorkerGoesOnDraining) {
  running_ = 1;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(100));
  v1::DrainResponse response;
  EXPECT_EQ(stub_->Drain(&context, {}, &response).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(draining_);
}

}  // namespace
}  // namespace winnow
