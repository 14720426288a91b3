// Kills, stops and leaves, against the three real processes: who learns what, how soon,
// and whether the memory comes back.
#include <gtest/gtest.h>
#include <signal.h>

#include <thread>

#include "absl/time/clock.h"
#include "tests/integration/cluster.h"
#include "tests/testing/tiny_served.h"

namespace winnow::testing {
namespace {

constexpr absl::Duration kNoticed = absl::Seconds(5);   // a lost worker, by the client
constexpr absl::Duration kReturned = absl::Seconds(1);  // pages, after that

class FaultsTest : public ::testing::Test {
 protected:
  FaultsTest() {
    cluster_ = std::make_unique<Cluster>(ClusterOptions{.model_dir = model_.dir(),
                                                        .adapter_dir = model_.adapter_dir(),
                                                        .kv_mode = "dms-fp8",
                                                        .kv_budget = "256MiB"});
  }

  // So long that a fault falls into it.
  v1::GenerateRequest LongRequest() const {
    v1::GenerateRequest request;
    for (int i = 0; i < 100; ++i) request.mutable_token_ids()->add_ids(i % 200);
    request.mutable_sampling()->set_max_tokens(model_.max_model_len() - 100);
    request.mutable_sampling()->set_ignore_eos(true);
    return request;
  }
  v1::GenerateRequest ShortRequest() const {
    v1::GenerateRequest request = LongRequest();
    request.mutable_sampling()->set_max_tokens(8);
    return request;
  }
  void ExpectServes() {
    // The router may need a moment to see a worker again.
    Generated result;
    for (int attempt = 0; attempt < 100; ++attempt) {
      result = cluster_->Generate(ShortRequest());
      if (result.status.ok()) break;
      absl::SleepFor(absl::Milliseconds(100));
    }
    EXPECT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(result.token_ids.size(), 8u);
    EXPECT_TRUE(cluster_->PagesReturn(kReturned));
  }

  TinyServed model_;
  std::unique_ptr<Cluster> cluster_;
};

TEST_F(FaultsTest, ClientLeavesInMidStream) {
  for (int message : {1, 2, 5}) {
    const Generated result = cluster_->Generate(LongRequest(), absl::Seconds(30),
                                                [message](int n, grpc::ClientContext* context) {
                                                  if (n == message) context->TryCancel();
                                                });
    EXPECT_EQ(result.status.error_code(), grpc::StatusCode::CANCELLED);
    EXPECT_TRUE(cluster_->PagesReturn(kReturned));
  }
  ExpectServes();
}

TEST_F(FaultsTest, DeadlinePassesInMidStream) {
  const Generated result = cluster_->Generate(LongRequest(), absl::Milliseconds(120));
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(cluster_->PagesReturn(kReturned));
  ExpectServes();
}

TEST_F(FaultsTest, DecodeWorkerIsKilled) {
  const Generated result =
      cluster_->Generate(LongRequest(), absl::Seconds(60), [this](int n, grpc::ClientContext*) {
        if (n == 3) cluster_->decode().Signal(SIGKILL);
      });
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE)
      << result.status.error_message();
  EXPECT_LT(result.since_last_message, kNoticed);
  cluster_->RestartDecode();
  ExpectServes();
}

TEST_F(FaultsTest, DecodeWorkerIsStopped) {
  const Generated result =
      cluster_->Generate(LongRequest(), absl::Seconds(60), [this](int n, grpc::ClientContext*) {
        if (n == 3) cluster_->decode().Signal(SIGSTOP);
      });
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE)
      << result.status.error_message();
  EXPECT_LT(result.since_last_message, kNoticed);
  cluster_->decode().Signal(SIGCONT);
  EXPECT_TRUE(cluster_->PagesReturn(absl::Seconds(3)));
  ExpectServes();
}

TEST_F(FaultsTest, PrefillWorkerIsKilled) {
  cluster_->prefill().Signal(SIGKILL);
  const Generated result = cluster_->Generate(ShortRequest(), absl::Seconds(30));
  // Noticed before dispatch, the decode worker prefills; noticed after, it is UNAVAILABLE.
  if (!result.status.ok()) {
    EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE)
        << result.status.error_message();
  }
  EXPECT_LT(result.elapsed, kNoticed);
  cluster_->RestartPrefill();
  ExpectServes();
}

TEST_F(FaultsTest, PrefillWorkerIsStopped) {
  cluster_->prefill().Signal(SIGSTOP);
  const Generated result = cluster_->Generate(ShortRequest(), absl::Seconds(30));
  if (!result.status.ok()) {
    EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE)
        << result.status.error_message();
  }
  EXPECT_LT(result.elapsed, kNoticed);
  cluster_->prefill().Signal(SIGCONT);
  ExpectServes();
}

TEST_F(FaultsTest, RouterIsKilled) {
  const Generated result =
      cluster_->Generate(LongRequest(), absl::Seconds(60), [this](int n, grpc::ClientContext*) {
        if (n == 3) cluster_->router().Signal(SIGKILL);
      });
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_LT(result.since_last_message, kNoticed);
  EXPECT_TRUE(cluster_->PagesReturn(kReturned));
}

TEST_F(FaultsTest, OnePrefillWorkerDiesUnderLoad) {
  std::vector<Generated> results(12);
  std::vector<std::thread> clients;
  for (Generated& result : results) {
    clients.emplace_back([this, &result] {
      v1::GenerateRequest request = LongRequest();
      request.mutable_sampling()->set_max_tokens(200);
      result = cluster_->Generate(request, absl::Seconds(60));
    });
  }
  absl::SleepFor(absl::Milliseconds(50));
  cluster_->prefill().Signal(SIGKILL);
  for (std::thread& client : clients) client.join();
  for (const Generated& result : results) {
    if (result.status.ok()) {
      EXPECT_EQ(result.token_ids.size(), 200u);
    } else {
      EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE)
          << result.status.error_message();
    }
  }
  cluster_->RestartPrefill();
  ExpectServes();
}

TEST_F(FaultsTest, TerminateDrainsAndExitsZero) {
  std::thread client([this] {
    v1::GenerateRequest request = LongRequest();
    request.mutable_sampling()->set_max_tokens(300);
    const Generated result = cluster_->Generate(request, absl::Seconds(60));
    EXPECT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(result.token_ids.size(), 300u);
  });
  absl::SleepFor(absl::Milliseconds(100));
  cluster_->router().Signal(SIGTERM);
  client.join();
  EXPECT_EQ(cluster_->router().WaitExit(), 0);
  cluster_->prefill().Signal(SIGTERM);
  cluster_->decode().Signal(SIGTERM);
  EXPECT_EQ(cluster_->prefill().WaitExit(), 0);
  EXPECT_EQ(cluster_->decode().WaitExit(), 0);
}

// No model is there to load: only what is said before the loading can be said.
TEST_F(FaultsTest, PortInUseIsNamedBeforeTheModelIsLoaded) {
  const std::string& taken = cluster_->address();
  for (const char* program : {"winnow-prefill-worker", "winnow-decode-worker", "winnow-router"}) {
    for (const bool metrics : {false, true}) {
      std::vector<std::string> args = {"--model=/no/such/model",
                                       "--listen=" + (metrics ? "127.0.0.1:0" : taken)};
      if (metrics) args.push_back("--metrics-port=" + taken);
      if (std::string_view(program) == "winnow-router") args.push_back("--decode-workers=" + taken);
      Process process(program, args);
      EXPECT_EQ(process.WaitExit(), 1) << program;
      EXPECT_NE(process.Errors().find("cannot listen on " + taken + ": Address already in use"),
                std::string::npos)
          << program << " wrote " << process.Errors();
    }
  }
}

}  // namespace
}  // namespace winnow::testing
