#include "common/base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "common/base/check.h"

namespace winnow {
namespace {

// Longer than the serial ops between two GEMMs of a small model's decode step,
// shorter than any time slice.
constexpr std::chrono::nanoseconds kSpin(8000);

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// True as soon as `ready()` is, false after kSpin.
template <typename Ready>
bool SpinUntil(const Ready& ready) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() - start < kSpin);
  return false;
}

}  // namespace

// Pieces are claimed by decrementing `ticket`, whose upper half counts the ops,
// so that a claim prepared for one op cannot succeed in the next. What describes
// the op is read after a claim only, and the caller rewrites it only when every
// claimed piece is done.
//
// Invariant: the caller and a thread about to sleep each write their own atomic
// first and read the other's second (both sequentially consistent), so one of
// them sees the other and no wake-up is lost.
struct ThreadPool::Impl {
  std::atomic<uint64_t> ticket{0};  // op number << 32 | pieces not yet claimed
  std::atomic<int> done{0};         // pieces finished in this op
  std::atomic<int> sleepers{0};
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stopping{false};
  // The op.
  const absl::FunctionRef<void(int, int)>* fn = nullptr;
  int count = 0, grain = 1, num_pieces = 0;

  std::mutex mu;  // guards the two waits only
  std::condition_variable work_cv, done_cv;
  std::vector<std::thread> threads;

  static bool HasPieces(uint64_t t) { return static_cast<uint32_t>(t) != 0; }
  bool AllDone() const { return done.load() == num_pieces; }

  // Runs pieces until none is left to claim.
  void RunPieces() {
    uint64_t t = ticket.load();
    while (HasPieces(t)) {
      if (!ticket.compare_exchange_weak(t, t - 1)) continue;
      const int pieces = num_pieces;
      const int begin = (pieces - static_cast<int>(static_cast<uint32_t>(t))) * grain;
      (*fn)(begin, std::min(begin + grain, count));
      if (done.fetch_add(1) + 1 == pieces && caller_sleeps.load()) {
        std::lock_guard<std::mutex> lock(mu);
        done_cv.notify_one();
      }
      t = ticket.load();
    }
  }

  void Loop() {
    const auto ready = [this] { return HasPieces(ticket.load()) || stopping.load(); };
    while (!stopping.load()) {
      RunPieces();
      if (SpinUntil(ready)) continue;
      std::unique_lock<std::mutex> lock(mu);
      sleepers.fetch_add(1);
      work_cv.wait(lock, ready);
      sleepers.fetch_sub(1);
    }
  }

  void WakeSleepers() {
    if (sleepers.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mu); }
    work_cv.notify_all();
  }

  // The pieces still running are other threads'.
  void WaitForDone() {
    if (SpinUntil([this] { return AllDone(); })) return;
    std::unique_lock<std::mutex> lock(mu);
    caller_sleeps.store(true);
    done_cv.wait(lock, [this] { return AllDone(); });
    caller_sleeps.store(false);
  }
};

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(std::max(num_threads, 1)), impl_(std::make_unique<Impl>()) {
  for (int i = 1; i < num_threads_; ++i) {
    impl_->threads.emplace_back([this] { impl_->Loop(); });
  }
}

ThreadPool::~ThreadPool() {
  impl_->stopping.store(true);
  { std::lock_guard<std::mutex> lock(impl_->mu); }
  impl_->work_cv.notify_all();
  for (std::thread& thread : impl_->threads) thread.join();
}

void ThreadPool::ParallelFor(int count, int grain, absl::FunctionRef<void(int, int)> fn) {
  WINNOW_CHECK(grain > 0);
  if (count <= 0) return;
  if (num_threads_ == 1 || count <= grain) {
    for (int begin = 0; begin < count; begin += grain) fn(begin, std::min(begin + grain, count));
    return;
  }
  Impl& impl = *impl_;
  impl.fn = &fn;
  impl.count = count;
  impl.grain = grain;
  impl.num_pieces = static_cast<int>((int64_t{count} + grain - 1) / grain);
  impl.done.store(0);
  const uint64_t op = (impl.ticket.load() >> 32) + 1;
  impl.ticket.store(op << 32 | static_cast<uint32_t>(impl.num_pieces));
  impl.WakeSleepers();
  impl.RunPieces();
  impl.WaitForDone();
}

}  // namespace winnow
