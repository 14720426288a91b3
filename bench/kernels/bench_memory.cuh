#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "bench/kernels/cuda_check.h"

// What the benches share.
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

// Device memory of one array, its owner's.
template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t n) { Check(cudaMalloc(&data_, std::max<size_t>(n, 1) * sizeof(T))); }
  explicit DeviceBuffer(const std::vector<T>& v) : DeviceBuffer(v.size()) {
    Check(cudaMemcpy(data_, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  T* get() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};

// Adds words [0, n) to *sum. Unlike ReadStream()'s, its loads stay in the L2 cache.
__global__ void __launch_bounds__(256) ReadWords(const uint4* in, int64_t n, uint32_t* sum) {
  uint32_t x = 0;
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * int64_t{256}) {
    const uint4 v = in[i];
    x += v.x + v.y + v.z + v.w;
  }
  atomicAdd(sum, x);
}

// Times work on one stream. Each run finds the L2 cache full of other memory's lines, which
// were read: there is nothing to write back meanwhile.
class BenchTimer {
 public:
  explicit BenchTimer(int runs = 0, cudaStream_t stream = nullptr) : runs_(runs), stream_(stream) {
    Check(cudaMalloc(&flush_, kFlushBytes + sizeof(uint32_t)));
    Check(cudaMemset(flush_, 0, kFlushBytes + sizeof(uint32_t)));
    Check(cudaEventCreate(&begin_));
    Check(cudaEventCreate(&end_));
  }
  ~BenchTimer() {
    cudaFree(flush_);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  BenchTimer(const BenchTimer&) = delete;
  BenchTimer& operator=(const BenchTimer&) = delete;
  void set_runs(int runs) { runs_ = runs; }

  // Microseconds, the median; `before` runs untimed before each.
  double Median(const std::function<void()>& work, const std::function<void()>& before = {}) {
    return Medians({work}, before)[0];
  }
  // Of each work, one run after another of all of them.
  std::vector<double> Medians(const std::vector<std::function<void()>>& works,
                              const std::function<void()>& before = {}) {
    std::vector<std::vector<double>> us(works.size());
    for (int i = -2; i < runs_; ++i) {
      for (size_t n = 0; n < works.size(); ++n) {
        if (before) before();
        FlushL2();
        Check(cudaEventRecord(begin_, stream_));
        works[n]();
        Check(cudaEventRecord(end_, stream_));
        Check(cudaEventSynchronize(end_));
        float ms = 0.0f;
        Check(cudaEventElapsedTime(&ms, begin_, end_));
        if (i >= 0) us[n].push_back(1e3 * static_cast<double>(ms));
      }
    }
    std::vector<double> medians;
    for (std::vector<double>& x : us) {
      std::sort(x.begin(), x.end());
      medians.push_back(x[x.size() / 2]);
    }
    return medians;
  }

  // Of what `capture` enqueues on the stream, which is not the default one, as one graph.
  double GraphMedian(const std::function<void()>& capture) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    capture();
    Check(cudaStreamEndCapture(stream_, &graph));
    Check(cudaGraphInstantiate(&exec, graph, 0));
    const double us = Median([&] { Check(cudaGraphLaunch(exec, stream_)); });
    Check(cudaGraphExecDestroy(exec));
    Check(cudaGraphDestroy(graph));
    return us;
  }

  // A device copy that reads and writes `bytes` / 2 each.
  double CopyUs(double bytes) {
    const size_t half = static_cast<size_t>(bytes / 2.0);
    BenchMemory memory;
    auto* from = memory.Allocate<char>(half);
    auto* to = memory.Allocate<char>(half);
    Check(cudaMemset(from, 1, half));
    return Median(
        [&] { Check(cudaMemcpyAsync(to, from, half, cudaMemcpyDeviceToDevice, stream_)); });
  }

 private:
  void FlushL2() {
    ReadWords<<<1024, 256, 0, stream_>>>(reinterpret_cast<const uint4*>(flush_),
                                         kFlushBytes / sizeof(uint4),
                                         reinterpret_cast<uint32_t*>(flush_ + kFlushBytes));
    Check(cudaGetLastError());
  }

  static constexpr size_t kFlushBytes = size_t{256} << 20;
  int runs_;
  cudaStream_t stream_;
  uint8_t* flush_ = nullptr;
  cudaEvent_t begin_, end_;
};

}  // namespace winnow
