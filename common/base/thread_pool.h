#pragma once

#include <functional>
#include <memory>

namespace winnow {

// Runs the pieces of one op on a fixed set of threads. Idle threads sleep at
// once, they never spin: several workers share the cores of one host (two
// processes whose pools spin slow each other 46-fold on two cores).
//
// ParallelFor may be called by one thread at a time, the pool's owner.
class ThreadPool {
 public:
  // `num_threads` >= 1 counts the calling thread: 1 starts none.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls fn(begin, end) over disjoint ranges that cover [0, count), each at
  // most `grain` long and starting at a multiple of `grain`; returns when all
  // are done. Which thread runs a range is unspecified, so a range's result
  // must not depend on it. Does not allocate.
  void ParallelFor(int count, int grain, const std::function<void(int, int)>& fn);

 private:
  struct Impl;
  const int num_threads_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace winnow
