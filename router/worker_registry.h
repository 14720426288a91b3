#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/metrics/metrics.h"
#include "common/rpc/channel_pool.h"
#include "router/routing_policy.h"

namespace winnow::router {

// Who is alive. Holds one WatchLoad stream to each configured worker, for ever: a stream
// that breaks, or is silent for kSilence, makes its worker not alive and is opened again.
// Thread-safe; a thread of its own watches the clock.
class WorkerRegistry {
 public:
  static constexpr absl::Duration kSilence = absl::Seconds(3);
  static constexpr absl::Duration kReconnectAfter = absl::Milliseconds(200);

  // `channels` and `metrics` are not owned and must outlive *this.
  WorkerRegistry(const std::vector<std::string>& prefill_targets,
                 const std::vector<std::string>& decode_targets, ChannelPool* channels,
                 MetricsRegistry* metrics);
  // Ends all streams and waits for them.
  ~WorkerRegistry();
  WorkerRegistry(const WorkerRegistry&) = delete;
  WorkerRegistry& operator=(const WorkerRegistry&) = delete;

  // The workers that are alive and do not drain, in the order of the configuration.
  std::vector<Candidate> Prefill() const;
  std::vector<Candidate> Decode() const;

  // Counts a request of this router in and out at `target`, for the next choices.
  void Dispatched(const std::string& target, int64_t prompt_tokens);
  void FirstTokenSeen(const std::string& target, int64_t prompt_tokens);
  void Released(const std::string& target);

  // A call to `target` failed in the transport: not alive until it reports again.
  void Suspect(const std::string& target);

 private:
  class Watcher;

  std::vector<Candidate> Alive(const std::vector<std::shared_ptr<Watcher>>& watchers) const;
  Watcher* Find(const std::string& target) const;
  void Run();

  std::vector<std::shared_ptr<Watcher>> prefill_;
  std::vector<std::shared_ptr<Watcher>> decode_;

  Mutex mu_;
  CondVar stop_cv_;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace winnow::router
