#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <vector>

// What the tests of CUDA kernels share.
namespace winnow {

// SetUp() of a fixture whose tests need a device: skips without one, or fails if
// WINNOW_REQUIRE_GPU is set.
inline void RequireGpu() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return;
  if (std::getenv("WINNOW_REQUIRE_GPU") != nullptr) FAIL() << "no CUDA device";
  GTEST_SKIP() << "no CUDA device";
}

// `size` elements of device memory, every byte 0xff at first (a NaN in any float format), and
// as many bytes again of the same around them, which must stay so.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size), guard_((size * sizeof(T) + 255) / 256 * 256) {
    EXPECT_EQ(cudaMalloc(&base_, 2 * guard_ + 512), cudaSuccess);
    EXPECT_EQ(cudaMemset(base_, 0xff, 2 * guard_ + 512), cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { Set(values); }
  ~DeviceArray() { cudaFree(base_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return reinterpret_cast<T*>(static_cast<uint8_t*>(base_) + 256); }
  size_t size() const { return size_; }
  void Set(const std::vector<T>& values) {
    ASSERT_EQ(values.size(), size_);
    EXPECT_EQ(cudaMemcpy(get(), values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  void Fill(int byte) { EXPECT_EQ(cudaMemset(get(), byte, size_ * sizeof(T)), cudaSuccess); }
  std::vector<T> Get() const {
    std::vector<uint8_t> all(2 * guard_ + 512);
    EXPECT_EQ(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    size_t touched = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      if ((i < 256 || i >= 256 + size_ * sizeof(T)) && all[i] != 0xff) ++touched;
    }
    EXPECT_EQ(touched, 0u) << "bytes outside the array were written";
    std::vector<T> values(size_);
    std::memcpy(static_cast<void*>(values.data()), all.data() + 256, size_ * sizeof(T));
    return values;
  }

 private:
  void* base_ = nullptr;
  size_t size_, guard_;
};

}  // namespace winnow
