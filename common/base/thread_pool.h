#pragma once

#include <memory>

#include "absl/functional/function_ref.h"

namespace winnow {

// Runs the pieces of one op on a fixed set of threads.
//
// Threads that wait do not spin: several workers share the cores of one host
// (two processes whose pools spin slow each other 46-fold on two cores). One
// exception keeps a run of small ops cheap: a helper that has just worked looks
// out for the next op for at most kSpin, then sleeps until it is woken; an idle
// pool uses no CPU.
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
  // must not depend on it. A helper that the system does not schedule delays
  // nothing: the caller runs the ranges that nobody took. Does not allocate.
  void ParallelFor(int count, int grain, absl::FunctionRef<void(int, int)> fn);

 private:
  struct Impl;
  const int num_threads_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace winnow
