#pragma once

#include <cstddef>
#include <deque>
#include <utility>

#include "common/base/mutex.h"

namespace winnow {

// Queue with many producers and one consumer; never holds more than `capacity`
// items. Thread-safe.
template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t capacity) : capacity_(capacity) {}

  // False, and `item` untouched, when the queue is full or closed.
  bool TryPush(T&& item) {
    MutexLock lock(&mu_);
    if (closed_ || items_.size() >= capacity_) return false;
    items_.push_back(std::move(item));
    nonempty_.NotifyOne();
    return true;
  }

  // Moves everything queued into the result; waits up to `timeout` when empty.
  std::deque<T> PopAll(absl::Duration timeout) {
    MutexLock lock(&mu_);
    if (items_.empty() && !closed_ && !woken_ && timeout > absl::ZeroDuration()) {
      nonempty_.WaitFor(&mu_, timeout);
    }
    woken_ = false;
    return std::exchange(items_, {});
  }

  // Ends a PopAll() that waits, or the next one, without an item.
  void Wake() {
    MutexLock lock(&mu_);
    woken_ = true;
    nonempty_.NotifyOne();
  }

  // Later pushes fail; what is queued can still be popped.
  void Close() {
    MutexLock lock(&mu_);
    closed_ = true;
    nonempty_.NotifyAll();
  }

  size_t size() const {
    MutexLock lock(&mu_);
    return items_.size();
  }

 private:
  const size_t capacity_;
  mutable Mutex mu_;
  CondVar nonempty_;
  std::deque<T> items_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  bool woken_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace winnow
