#include "common/base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "common/base/check.h"

namespace winnow {

struct ThreadPool::Impl {
  std::mutex mu;
  std::condition_variable work_cv;
  std::condition_variable done_cv;
  std::vector<std::thread> threads;
  // Under mu.
  int64_t epoch = 0;
  int active = 0;  // helpers that have not finished this epoch
  bool stopping = false;
  // Written before `epoch` moves, read by helpers after.
  const std::function<void(int, int)>* fn = nullptr;
  int count = 0;
  int grain = 1;
  std::atomic<int> next{0};

  void RunPieces() {
    for (;;) {
      const int begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      (*fn)(begin, std::min(begin + grain, count));
    }
  }

  void Loop() {
    int64_t seen = 0;
    std::unique_lock<std::mutex> lock(mu);
    for (;;) {
      work_cv.wait(lock, [&] { return stopping || epoch != seen; });
      if (stopping) return;
      seen = epoch;
      lock.unlock();
      RunPieces();
      lock.lock();
      if (--active == 0) done_cv.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(std::max(num_threads, 1)), impl_(std::make_unique<Impl>()) {
  for (int i = 1; i < num_threads_; ++i) {
    impl_->threads.emplace_back([this] { impl_->Loop(); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(impl_->mu);
    impl_->stopping = true;
  }
  impl_->work_cv.notify_all();
  for (std::thread& thread : impl_->threads) thread.join();
}

void ThreadPool::ParallelFor(int count, int grain, const std::function<void(int, int)>& fn) {
  WINNOW_CHECK(grain > 0);
  if (count <= 0) return;
  if (num_threads_ == 1 || count <= grain) {
    for (int begin = 0; begin < count; begin += grain) fn(begin, std::min(begin + grain, count));
    return;
  }
  {
    std::lock_guard<std::mutex> lock(impl_->mu);
    impl_->fn = &fn;
    impl_->count = count;
    impl_->grain = grain;
    impl_->next.store(0, std::memory_order_relaxed);
    impl_->active = num_threads_ - 1;
    ++impl_->epoch;
  }
  impl_->work_cv.notify_all();
  impl_->RunPieces();
  std::unique_lock<std::mutex> lock(impl_->mu);
  impl_->done_cv.wait(lock, [&] { return impl_->active == 0; });
}

}  // namespace winnow
