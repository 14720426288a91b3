#include "router/admission.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/rpc/grpc_status.h"

namespace winnow::router {
namespace {

constexpr absl::Duration kRetryAfter = absl::Seconds(1);

}  // namespace

absl::Status Admission::Enter(uint64_t id, std::function<void()> start) {
  {
    MutexLock lock(&mu_);
    if (closed_) {
      return WithReason(absl::UnavailableError("the router is shutting down"),
                        v1::ERROR_REASON_DRAINING);
    }
    if (running_ >= max_running_) {
      if (static_cast<int>(queue_.size()) >= max_waiting_) {
        return WithReason(
            absl::ResourceExhaustedError(absl::StrCat(
                "the queue is full: ", running_, " requests running, ", queue_.size(), " waiting")),
            v1::ERROR_REASON_QUEUE_FULL, kRetryAfter);
      }
      entries_[id] = std::move(start);
      queue_.push_back(id);
      return absl::OkStatus();
    }
    entries_[id] = nullptr;
    ++running_;
  }
  start();
  return absl::OkStatus();
}

void Admission::Leave(uint64_t id) {
  mu_.Lock();
  const auto it = entries_.find(id);
  if (it == entries_.end()) {
    mu_.Unlock();
    return;
  }
  const bool waited = it->second != nullptr;
  entries_.erase(it);
  if (waited) {
    queue_.erase(std::find(queue_.begin(), queue_.end(), id));
  } else {
    --running_;
  }
  while (running_ < max_running_ && !queue_.empty()) {
    ready_.push_back(std::exchange(entries_[queue_.front()], nullptr));
    queue_.pop_front();
    ++running_;
  }
  // A `start` that leaves at once comes back here: only the outermost call works through
  // ready_, so a long queue of failing requests needs no deep stack.
  if (!starting_) {
    starting_ = true;
    while (!ready_.empty()) {
      const std::function<void()> start = std::move(ready_.front());
      ready_.pop_front();
      mu_.Unlock();
      start();
      mu_.Lock();
    }
    starting_ = false;
  }
  mu_.Unlock();
}

void Admission::Close() {
  MutexLock lock(&mu_);
  closed_ = true;
}

int Admission::running() const {
  MutexLock lock(&mu_);
  return running_;
}

int Admission::waiting() const {
  MutexLock lock(&mu_);
  return static_cast<int>(queue_.size());
}

}  // namespace winnow::router
