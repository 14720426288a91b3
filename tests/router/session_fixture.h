#pragma once

#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/rpc/server_runner.h"
#include "router/inference_service.h"
#include "router/session.h"
#include "tests/router/fake_worker.h"
#include "tests/testing/temp_dir.h"

namespace winnow::router {

// All that a client saw of one call.
struct Outcome {
  std::vector<v1::GenerateResponse> responses;
  absl::Status status;

  std::vector<int32_t> token_ids() const {
    std::vector<int32_t> ids;
    for (const auto& r : responses)
      ids.insert(ids.end(), r.token_ids().begin(), r.token_ids().end());
    return ids;
  }
  std::string text() const {
    std::string text;
    for (const auto& r : responses) text += r.text();
    return text;
  }
  const v1::GenerateResponse& last() const { return responses.back(); }
};

// The router against fake workers: real gRPC on loopback, scripted calls.
class SessionTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite();
  static void TearDownTestSuite();

  // Workers whose default script answers "hello world" in three events.
  void SetUp() override;
  // Every request must have given back its place.
  void TearDown() override;

  // A router on loopback that has seen all these workers alive.
  void Start(const std::vector<std::string>& prefills, const std::vector<std::string>& decodes,
             int max_running = 8, int max_waiting = 8);
  void StartPair(int max_running = 8, int max_waiting = 8) {
    Start({prefill_.target()}, {decode_.target()}, max_running, max_waiting);
  }

  // Scripts of workers: both legs say nothing until they are cancelled; the first token waits.
  void HangBothLegs();
  void HoldPrefillUntil(const std::atomic<bool>& go);

  // The prompt "abc".
  static v1::GenerateRequest Request(int max_tokens = 11);

  // Calls the router and reads to the end.
  Outcome Generate(const v1::GenerateRequest& request, absl::Duration timeout = absl::Seconds(20));
  Outcome Generate(const v1::GenerateRequest& request, grpc::ClientContext* context);

  static winnow::testing::TempDir* dir_;
  static ServedModel* model_;

  winnow::testing::FakeWorker prefill_{v1::WORKER_ROLE_PREFILL};
  winnow::testing::FakeWorker decode_{v1::WORKER_ROLE_DECODE};
  std::vector<int32_t> hello_;
  ChannelPool channels_;
  std::unique_ptr<MetricsRegistry> metrics_registry_;
  std::unique_ptr<RouterMetrics> metrics_;
  std::unique_ptr<WorkerRegistry> registry_;
  std::unique_ptr<Admission> admission_;
  std::unique_ptr<InferenceService> service_;
  std::unique_ptr<ServerRunner> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

}  // namespace winnow::router
