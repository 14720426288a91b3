#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/config/config.h"
#include "common/engine/runtime.h"
#include "common/metrics/metrics.h"
#include "common/rpc/server_runner.h"
#include "common/transport/manifest.h"
#include "common/transport/staging.h"
#include "common/worker/worker_load.h"
#include "winnow/v1/worker.pb.h"

namespace winnow {

// What both kinds of worker are made of.
struct WorkerBase {
  std::unique_ptr<Runtime> runtime;
  std::unique_ptr<StagingRing> ring;
  TransferLimits limits;
  v1::LayoutFingerprint layout;
  uint64_t incarnation = 0;  // random, not 0
};

// Loads the model and allocates KV memory and staging; logs the budget.
//   Errors as CheckListen(), before anything is loaded, Runtime::Create(), StagingRing::Create().
absl::StatusOr<WorkerBase> MakeWorkerBase(const config::WorkerConfig& config);
// The same over a runtime that is there.
struct StagingOptions {
  uint64_t bytes = uint64_t{128} << 20;         // at most, beyond two slots
  uint64_t max_slot_bytes = uint64_t{4} << 20;  // a larger layer goes in segments
};
absl::StatusOr<WorkerBase> MakeWorkerBase(std::unique_ptr<Runtime> runtime,
                                          const StagingOptions& staging = {});

// Most requests that a worker holds at once.
int MaxOpenRequests(const config::WorkerConfig& config);

// The engine's side of a worker's server. Any thread.
struct WorkerHooks {
  std::function<WorkerLoad()> load;
  std::function<void()> start_draining;
  std::function<bool()> draining;
  std::function<int()> open_requests;
};

v1::LoadSnapshot MakeSnapshot(v1::WorkerRole role, const WorkerBase& base,
                              const WorkerHooks& hooks);

// Serves `services`, Worker, health and metrics until SIGTERM or SIGINT, drains, and
// returns the exit code: 0, or 1 after one sentence on standard error when an address
// cannot be bound. Nothing is owned. On return no call is open any more.
int ServeWorker(const config::ServerConfig& config, v1::WorkerRole role, const WorkerBase& base,
                const std::vector<ServedService>& services, const WorkerHooks& hooks,
                MetricsRegistry* metrics);

// For main(): parses flags, sets up the log, and keeps signals for ServeWorker(). The
// exit code if the process is to end now.
std::optional<int> ParseWorkerFlags(const char* program, const char* role, int argc, char** argv,
                                    config::WorkerConfig* config);
// Prints `status` as "PROGRAM: SENTENCE" to standard error; returns 1.
int FailMain(const char* program, const absl::Status& status);

}  // namespace winnow
