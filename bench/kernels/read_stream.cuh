#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "bench/kernels/cuda_check.h"

// The rate at which this device reads memory that no cache holds: the limit that the benches
// of memory-bound kernels are measured against, in the same run.
namespace winnow {

__device__ __forceinline__ uint4 StreamWord(int64_t i) {
  uint64_t x = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9ull;
  const auto lo = static_cast<uint32_t>(x), hi = static_cast<uint32_t>(x >> 32);
  return make_uint4(lo, hi, lo * 5u + 1u, hi * 9u + 7u);
}

__device__ __forceinline__ uint32_t WordSum(uint4 v) { return v.x + v.y + v.z + v.w; }

__device__ __forceinline__ void AddToSum(uint32_t x, uint32_t* sum) {
  x = __reduce_add_sync(0xffffffffu, x);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, x);
}

// Writes words [0, n) and adds them up from the formula, not from memory.
__global__ void __launch_bounds__(256) FillStream(uint4* out, int64_t n, uint32_t* sum) {
  uint32_t x = 0;
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * int64_t{256}) {
    out[i] = StreamWord(i);
    x += WordSum(StreamWord(i));
  }
  AddToSum(x, sum);
}

// Adds words [0, n) to *sum. `kLoads` 16-byte loads of a thread are in flight.
template <int kThreads, int kLoads>
__global__ void __launch_bounds__(kThreads) ReadStream(const uint4* in, int64_t n, uint32_t* sum) {
  uint32_t x = 0;
  const int64_t step = gridDim.x * int64_t{kThreads};
  int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (; i + (kLoads - 1) * step < n; i += kLoads * step) {
    uint4 v[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) v[j] = __ldcs(in + i + j * step);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) x += WordSum(v[j]);
  }
  for (; i < n; i += step) x += WordSum(__ldcs(in + i));
  AddToSum(x, sum);
}

// GB/s of a stream of `bytes` (a multiple of 16, many times the L2 cache) that is only read: the
// best of several grids, each the median of 7 runs. Exits if a run's sum shows that a byte was
// not read.
inline double MeasureReadStream(cudaStream_t stream, int64_t bytes = int64_t{2} << 30) {
  const int64_t n = bytes / 16;
  uint4* words = nullptr;
  uint32_t* sums = nullptr;
  Check(cudaMalloc(&words, static_cast<size_t>(bytes)));
  Check(cudaMalloc(&sums, 8));
  Check(cudaMemsetAsync(sums, 0, 8, stream));
  FillStream<<<2048, 256, 0, stream>>>(words, n, sums);
  int device = 0, num_sms = 0;
  Check(cudaGetDevice(&device));
  Check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin));
  Check(cudaEventCreate(&end));
  float best = 1e30f;
  const auto measure = [&](auto kernel, int threads, int blocks_per_sm) {
    float times[7];
    for (int i = -1; i < 7; ++i) {
      Check(cudaMemsetAsync(sums + 1, 0, 4, stream));
      Check(cudaEventRecord(begin, stream));
      kernel<<<blocks_per_sm * num_sms, threads, 0, stream>>>(words, n, sums + 1);
      Check(cudaEventRecord(end, stream));
      uint32_t sum[2];
      Check(cudaMemcpyAsync(sum, sums, 8, cudaMemcpyDeviceToHost, stream));
      Check(cudaStreamSynchronize(stream));
      if (sum[0] != sum[1]) {
        std::fprintf(stderr, "the read stream skipped bytes\n");
        std::exit(1);
      }
      float ms = 0.0f;
      Check(cudaEventElapsedTime(&ms, begin, end));
      if (i >= 0) times[i] = ms;
    }
    std::sort(times, times + 7);
    best = std::min(best, times[3]);
  };
  for (const int blocks : {1, 2, 4, 16}) {
    measure(ReadStream<512, 8>, 512, blocks);
    measure(ReadStream<1024, 4>, 1024, blocks);
    measure(ReadStream<256, 16>, 256, blocks);
  }
  Check(cudaEventDestroy(begin));
  Check(cudaEventDestroy(end));
  Check(cudaFree(words));
  Check(cudaFree(sums));
  return static_cast<double>(bytes) / best / 1e6;
}

}  // namespace winnow
