#include "kernels/thread_scratch.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "common/base/check.h"

namespace winnow::kernels {
namespace {

constexpr size_t kAlign = 64;

size_t RoundUp(size_t bytes) { return (std::max<size_t>(bytes, 1) + kAlign - 1) / kAlign * kAlign; }

}  // namespace

void ThreadScratch::Free::operator()(uint8_t* p) const {
  ::operator delete[](p, std::align_val_t{kAlign});
}

ThreadScratch::ThreadScratch(int num_threads, size_t bytes_each)
    : num_threads_(num_threads),
      bytes_each_(RoundUp(bytes_each)),
      busy_(static_cast<size_t>(num_threads)) {
  WINNOW_CHECK(num_threads >= 1);
  const size_t bytes = bytes_each_ * static_cast<size_t>(num_threads);
  data_.reset(static_cast<uint8_t*>(::operator new[](bytes, std::align_val_t{kAlign})));
}

ThreadScratch::Lease::Lease(ThreadScratch* scratch) : scratch_(scratch) {
  for (int i = 0; i < scratch->num_threads_; ++i) {
    std::atomic<bool>& busy = scratch->busy_[static_cast<size_t>(i)];
    if (!busy.exchange(true, std::memory_order_acquire)) {
      idx_ = i;
      data_ = scratch->data_.get() + static_cast<size_t>(i) * scratch->bytes_each_;
      return;
    }
  }
  WINNOW_CHECK(false && "more threads than scratch blocks");
}

ThreadScratch::Lease::~Lease() {
  scratch_->busy_[static_cast<size_t>(idx_)].store(false, std::memory_order_release);
}

}  // namespace winnow::kernels
