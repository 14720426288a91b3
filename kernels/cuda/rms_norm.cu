#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/vector_io.cuh"

namespace winnow::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kManyRows = 1024;  // from here on blocks share an SM, and overlap
constexpr int kSums = 16;        // of the CPU's law of order

__device__ __forceinline__ void Prefetch(const float* p) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

// rms_norm.cc's SumOfSquares() of x [n] in shared memory; the lanes of one warp. kAhead: the chain
// of additions is what takes time, so values come early.
template <int kAhead>
__device__ float SumOfSquares(const float* x, int n) {
  const int lane = static_cast<int>(threadIdx.x) % kSums;  // both halves do the same
  const int whole = n / kSums * kSums;
  float sum = 0.0f;
  float next[kAhead];
  const auto load = [&](int begin) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = begin + j * kSums + lane;
      next[j] = i < whole ? x[i] : 0.0f;  // adds 0, which changes nothing
    }
  };
  load(0);
  for (int begin = 0; begin < whole;) {
    float now[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) now[j] = next[j];
    begin += kAhead * kSums;
    load(begin);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) sum = __fmaf_rn(now[j], now[j], sum);
  }
  // What is left is not fused there.
  if (whole + lane < n) {
    sum = __fadd_rn(sum, __fmul_rn(x[whole + lane], x[whole + lane]));
  }
#pragma unroll
  for (int step = kSums / 2; step > 0; step /= 2) {
    sum = __fadd_rn(sum, __shfl_down_sync(0xffffffffu, sum, step, kSums));
  }
  return __shfl_sync(0xffffffffu, sum, 0);
}

// Grid: rows, in turns. Shared memory: a row. kWidth elements a thread at a time. kMany: with
// fewer registers, so that more blocks share an SM.
template <int kWidth, bool kMany>
__global__ void __launch_bounds__(kThreads, kMany ? 6 : 2)
    RmsNormKernel(const RmsNormCudaParams p) {
  constexpr int kBatch = kMany ? 2 : 4, kAhead = kMany ? 8 : 16;
  ptx::WaitForPredecessors();
  extern __shared__ __align__(16) float x[];  // [n]
  __shared__ float inverse;
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  for (int64_t row = blockIdx.x; row < p.m; row += gridDim.x) {
    const float* in = p.x + row * p.ldx;
    // Loads of a batch come first: the compiler may not move them past the stores.
    for (int begin = first; begin < p.n; begin += kBatch * kThreads * kWidth) {
      device::Floats<kWidth> y[kBatch], z[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int i = begin + k * kThreads * kWidth;
        if (i >= p.n) continue;
        y[k] = device::Load<kWidth>(in + i);
        if (p.add_f32 != nullptr) z[k] = device::Load<kWidth>(p.add_f32 + row * p.n + i);
        if (p.add_bf16 != nullptr) z[k] = device::Load<kWidth>(p.add_bf16 + row * p.n + i);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int i = begin + k * kThreads * kWidth;
        if (i >= p.n) continue;
        if (p.add_f32 != nullptr || p.add_bf16 != nullptr) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) y[k].v[j] = __fadd_rn(y[k].v[j], z[k].v[j]);
        }
        device::Store<kWidth>(y[k], x + i);
        if (p.residual != nullptr) device::Store<kWidth>(y[k], p.residual + row * p.ldx + i);
      }
    }
    for (int i = first; i < p.n; i += kThreads * kWidth) Prefetch(p.weight + i);
    __syncthreads();
    if (threadIdx.x < 32) {
      const float mean = __fdiv_rn(SumOfSquares<kAhead>(x, p.n), static_cast<float>(p.n));
      if (threadIdx.x == 0) inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, p.eps)));
    }
    __syncthreads();
#pragma unroll 4
    for (int i = first; i < p.n; i += kThreads * kWidth) {
      device::Floats<kWidth> y = device::Load<kWidth>(x + i);
      const device::Floats<kWidth> w = device::Load<kWidth>(p.weight + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) y.v[j] = __fmul_rn(__fmul_rn(y.v[j], inverse), w.v[j]);
      if (p.out_bf16 != nullptr) device::Store<kWidth>(y, p.out_bf16 + row * p.n + i);
      if (p.out_f32 != nullptr) device::Store<kWidth>(y, p.out_f32 + row * p.n + i);
    }
    __syncthreads();  // before the next row
  }
}

}  // namespace

absl::Status ValidateRmsNormCuda(const RmsNormCudaParams& p) {
  if (p.x == nullptr || p.weight == nullptr) {
    return absl::InvalidArgumentError("rms_norm: x or weight is null");
  }
  if (p.out_bf16 == nullptr && p.out_f32 == nullptr) {
    return absl::InvalidArgumentError("rms_norm: no output is set");
  }
  if (p.add_f32 != nullptr && p.add_bf16 != nullptr) {
    return absl::InvalidArgumentError("rms_norm: both add_f32 and add_bf16 are set");
  }
  if (p.m < 0 || p.n < 1 || p.n > kMaxRmsNormCuda || p.ldx < p.n) {
    return absl::InvalidArgumentError(
        absl::StrCat("rms_norm: bad shape m=", p.m, " n=", p.n, " ldx=", p.ldx));
  }
  return absl::OkStatus();
}

absl::Status CheckRmsNormSharedBytes(int n, int64_t limit) {
  constexpr int64_t kStaticBytes = 16;  // at most
  return CheckSharedBytes("rms_norm", "n", n, int64_t{n} * sizeof(float) + kStaticBytes, limit);
}

absl::Status LaunchRmsNorm(const RmsNormCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateRmsNormCuda(p));
  if (p.m == 0) return absl::OkStatus();
  const bool wide = p.n % 4 == 0 && p.ldx % 4 == 0 && Aligned(p.x, 16) && Aligned(p.add_f32, 16) &&
                    Aligned(p.add_bf16, 8) && Aligned(p.residual, 16) && Aligned(p.weight, 16) &&
                    Aligned(p.out_bf16, 8) && Aligned(p.out_f32, 16);
  const bool many = p.m >= kManyRows;
  const auto kernel = wide ? (many ? RmsNormKernel<4, true> : RmsNormKernel<4, false>)
                           : (many ? RmsNormKernel<1, true> : RmsNormKernel<1, false>);
  const size_t shared_bytes = static_cast<size_t>(p.n) * sizeof(float);
  if (shared_bytes > 40 << 10) {  // with the static ones, 48 KB is what needs no asking
    WINNOW_ASSIGN_OR_RETURN(const int limit, SharedBytesLimit());
    WINNOW_RETURN_IF_ERROR(CheckRmsNormSharedBytes(p.n, limit));
    WINNOW_RETURN_IF_ERROR(CudaStatus(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes))));
  }
  const dim3 grid(static_cast<unsigned>(std::min(p.m, 1 << 20)));
  return LaunchEarly(kernel, grid, kThreads, shared_bytes, stream, p);
}

}  // namespace winnow::kernels
