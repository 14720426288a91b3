#include "common/kv/page_pool.h"

#include <algorithm>

#include "common/base/check.h"

namespace winnow {

PagePool::PagePool(int num_pages) : total_(num_pages), taken_(static_cast<size_t>(num_pages)) {
  free_.reserve(static_cast<size_t>(num_pages));
  for (int page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

bool PagePool::Reserve(int64_t n) {
  WINNOW_CHECK(n >= 0);
  if (n > available()) return false;
  reserved_ += static_cast<int>(n);
  return true;
}

void PagePool::Unreserve(int64_t n) {
  WINNOW_CHECK(n >= 0 && n <= reserved_);
  reserved_ -= static_cast<int>(n);
}

int32_t PagePool::Take() {
  WINNOW_CHECK(!free_.empty());
  const int32_t page = free_.back();
  free_.pop_back();
  taken_[static_cast<size_t>(page)] = true;
  peak_ = std::max(peak_, used());
  return page;
}

void PagePool::Give(int32_t page) {
  WINNOW_CHECK(page >= 0 && page < total_ && taken_[static_cast<size_t>(page)]);
  taken_[static_cast<size_t>(page)] = false;
  free_.push_back(page);
}

void PagePool::Shuffle(uint32_t seed) {
  // xorshift32; any scramble will do.
  uint32_t x = seed | 1u;
  for (size_t i = free_.size(); i > 1; --i) {
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    std::swap(free_[i - 1], free_[x % i]);
  }
}

}  // namespace winnow
