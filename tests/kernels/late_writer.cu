#include <cuda_runtime.h>

#include "common/cuda/cuda_status.h"
#include "kernels/cuda/ptx.cuh"
#include "tests/kernels/late_writer.h"

namespace winnow {
namespace {

constexpr int kThreads = 256, kBlocks = 128;
constexpr int kLateBlocks = 32;  // leaves room for clusters to start

template <typename Visit>
__device__ void ForEachDifference(const WordPair& words, Visit visit) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words.size; i += step) {
    if (words.live[i] != words.wanted[i]) visit(i);
  }
}

__global__ void __launch_bounds__(kThreads) PoisonKernel(const WordPair words) {
  ForEachDifference(words, [&](int64_t i) { words.live[i] = 0xffffffffu; });
}

__device__ uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void __launch_bounds__(kThreads)
    LateWriterKernel(const WordPair a, const WordPair b, uint64_t delay_ns) {
  kernels::ptx::LetDependentsStart();
  const uint64_t start = Nanoseconds();
  while (Nanoseconds() - start < delay_ns) __nanosleep(1000);
  ForEachDifference(a, [&](int64_t i) { a.live[i] = a.wanted[i]; });
  ForEachDifference(b, [&](int64_t i) { b.live[i] = b.wanted[i]; });
}

}  // namespace

absl::Status LaunchPoisonDifferences(const WordPair& words, StreamHandle stream) {
  PoisonKernel<<<kBlocks, kThreads, 0, stream>>>(words);
  return CudaStatus(cudaGetLastError());
}

absl::Status LaunchLateWriter(const WordPair& a, const WordPair& b, int delay_us,
                              StreamHandle stream) {
  LateWriterKernel<<<kLateBlocks, kThreads, 0, stream>>>(a, b, uint64_t{1000} * delay_us);
  return CudaStatus(cudaGetLastError());
}

}  // namespace winnow
