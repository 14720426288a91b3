#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "common/base/mutex.h"

namespace winnow::router {

// Bounds how many requests are in work and how many wait for a place. Thread-safe.
class Admission {
 public:
  Admission(int max_running, int max_waiting)
      : max_running_(max_running), max_waiting_(max_waiting) {}

  // Asks for a place under `id`, the caller's and not in use. Calls `start` once, at once
  // or from a later Leave() of another request, without any lock held.
  //   RESOURCE_EXHAUSTED  queue full, with a hint when to try again.
  //   UNAVAILABLE         Close() was called.
  absl::Status Enter(uint64_t id, std::function<void()> start);

  // Gives the place back, or leaves the queue; a request that waits may start within the
  // call, and leave again in its `start`. Ignores an id that is not known.
  void Leave(uint64_t id);

  // Refuses new requests from now on; those that wait may still start.
  void Close();

  int running() const;
  int waiting() const;

 private:
  const int max_running_;
  const int max_waiting_;

  mutable Mutex mu_;
  std::map<uint64_t, std::function<void()>> entries_ ABSL_GUARDED_BY(mu_);  // empty: running
  std::deque<uint64_t> queue_ ABSL_GUARDED_BY(mu_);                         // in order of arrival
  std::deque<std::function<void()>> ready_ ABSL_GUARDED_BY(mu_);  // have a place, to be started
  bool starting_ ABSL_GUARDED_BY(mu_) = false;  // some thread works through ready_
  int running_ ABSL_GUARDED_BY(mu_) = 0;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace winnow::router
