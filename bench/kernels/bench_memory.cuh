#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "bench/kernels/cuda_check.h"

// What the benches of memory-bound ops share.
namespace winnow {

// Device memory that lasts until the end of the program or a Free().
class BenchMemory {
 public:
  ~BenchMemory() { Free(); }
  template <typename T>
  T* Allocate(size_t n) {
    void* p = nullptr;
    Check(cudaMalloc(&p, n * sizeof(T)));
    held_.push_back(p);
    return static_cast<T*>(p);
  }
  template <typename T>
  T* Upload(const std::vector<T>& x) {
    T* p = Allocate<T>(x.size());
    Check(cudaMemcpy(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
  }
  void Free() {
    for (void* p : held_) Check(cudaFree(p));
    held_.clear();
  }

 private:
  std::vector<void*> held_;
};

// Times work on the default stream; each run finds the L2 cache flushed.
class BenchTimer {
 public:
  explicit BenchTimer(int runs) : runs_(runs) {
    Check(cudaMalloc(&flush_, kFlushBytes));
    Check(cudaEventCreate(&begin_));
    Check(cudaEventCreate(&end_));
  }

  // Microseconds, the median; `before` runs untimed before each.
  double Median(const std::function<void()>& work, const std::function<void()>& before = {}) {
    std::vector<double> us;
    for (int i = -2; i < runs_; ++i) {
      if (before) before();
      Check(cudaMemsetAsync(flush_, i & 1, kFlushBytes, nullptr));
      Check(cudaEventRecord(begin_, nullptr));
      work();
      Check(cudaEventRecord(end_, nullptr));
      Check(cudaEventSynchronize(end_));
      float ms = 0.0f;
      Check(cudaEventElapsedTime(&ms, begin_, end_));
      if (i >= 0) us.push_back(1e3 * static_cast<double>(ms));
    }
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
  }

  // A device copy that reads and writes `bytes` / 2 each.
  double CopyUs(double bytes) {
    const size_t half = static_cast<size_t>(bytes / 2.0);
    BenchMemory memory;
    auto* from = memory.Allocate<char>(half);
    auto* to = memory.Allocate<char>(half);
    Check(cudaMemset(from, 1, half));
    return Median(
        [&] { Check(cudaMemcpyAsync(to, from, half, cudaMemcpyDeviceToDevice, nullptr)); });
  }

 private:
  static constexpr size_t kFlushBytes = size_t{256} << 20;
  const int runs_;
  void* flush_ = nullptr;
  cudaEvent_t begin_, end_;
};

}  // namespace winnow
