#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

#include "common/base/check.h"

namespace winnow::kernels {

// `count` uninitialised elements of a trivial type at a 64-byte boundary, with
// 64 readable bytes past the end. Move-only; empty by default.
template <typename T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t count) : size_(count) {
    const size_t bytes = (count * sizeof(T) + 2 * 64 - 1) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    WINNOW_CHECK(data_ != nullptr);
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }

  // Grows to at least `count` elements; the content is lost when it grows.
  void Reserve(size_t count) {
    if (count > size_) *this = AlignedBuffer(count);
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  size_t size_ = 0;
  std::unique_ptr<T[], Free> data_;
};

}  // namespace winnow::kernels
