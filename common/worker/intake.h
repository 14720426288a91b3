#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/bounded_queue.h"
#include "common/rpc/grpc_status.h"

namespace winnow {

// The door between a worker's gRPC threads and its engine thread: requests and cancels go
// in, counted and bounded. Open is what the engine thread keeps of one request; it has
// `id`, `request.request` (an engine Request) and `sink`.
template <typename Open>
class Intake {
 public:
  using OpenPtr = std::unique_ptr<Open>;

  explicit Intake(int max_open) : max_open_(max_open), queue_(static_cast<size_t>(max_open)) {}

  // Any thread. The id it is known by from now on.
  //   UNAVAILABLE         draining or stopping.
  //   RESOURCE_EXHAUSTED  max_open requests are open.
  absl::StatusOr<uint64_t> Submit(OpenPtr open) {
    if (draining_) {
      return WithReason(absl::UnavailableError("the worker is draining"),
                        v1::ERROR_REASON_DRAINING);
    }
    // Counted first, so that open_requests() never misses one.
    if (open_.fetch_add(1) >= max_open_) {
      --open_;
      return WithReason(absl::ResourceExhaustedError(absl::StrCat(max_open_, " requests are open")),
                        v1::ERROR_REASON_QUEUE_FULL, absl::Seconds(1));
    }
    const uint64_t id = next_id_++;
    open->id = id;
    open->request.request.id = id;
    if (!queue_.TryPush(std::move(open))) {
      --open_;
      return absl::UnavailableError("the worker is shutting down");
    }
    return id;
  }
  void Cancel(uint64_t id) {
    {
      MutexLock lock(&cancel_mu_);
      cancels_.push_back(id);
    }
    Wake();
  }
  // The engine thread has something to do.
  void Wake() { queue_.Wake(); }
  void StartDraining() { draining_ = true; }
  bool draining() const { return draining_; }
  void Stop() {
    draining_ = true;
    stopping_ = true;
    queue_.Close();
  }
  bool stopping() const { return stopping_; }
  // Submitted and not ended.
  int open_requests() const { return open_; }

  // The engine thread. Take the cancels before the requests: those they mean were pushed
  // earlier.
  std::vector<uint64_t> TakeCancels() {
    MutexLock lock(&cancel_mu_);
    return std::exchange(cancels_, {});
  }
  std::deque<OpenPtr> PopAll(absl::Duration timeout) { return queue_.PopAll(timeout); }
  // A request's sink is about to have its last call.
  void Ended() { --open_; }
  // Ends all that were never taken.
  void FailQueued(const absl::Status& why) {
    for (OpenPtr& open : PopAll(absl::ZeroDuration())) {
      Ended();
      open->sink->OnFailed(why);
    }
  }

 private:
  const int max_open_;
  BoundedQueue<OpenPtr> queue_;
  Mutex cancel_mu_;
  std::vector<uint64_t> cancels_ ABSL_GUARDED_BY(cancel_mu_);
  std::atomic<uint64_t> next_id_{1};
  std::atomic<int> open_{0};
  std::atomic<bool> draining_{false};
  std::atomic<bool> stopping_{false};
};

}  // namespace winnow
