#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/dms_logits.h"

namespace winnow::kernels {
namespace {

constexpr int kThreads = 128, kHalfWarps = kThreads / 16;
constexpr int kFewRows = 512;  // up to here one row and head a half-warp fills the GPU better

__device__ float Value(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

// Sixteen lanes for kRows rows and kHeads heads; lane l has the law's sum of h % 16 == l, and
// the loads of kAhead additions to each sum are under way at a time.
// Grid (pieces of the rows, pieces of the heads).
template <int kRows, int kHeads, int kAhead>
__global__ void __launch_bounds__(kThreads) LogitsKernel(const DmsLogitsCudaParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const int row =
      (static_cast<int>(blockIdx.x) * kHalfWarps + static_cast<int>(threadIdx.x) / 16) * kRows;
  const int head = static_cast<int>(blockIdx.y) * kHeads;
  // Rows and heads past the end read the last one's.
  const Bf16* x[kRows];
  const float* w[kHeads];
#pragma unroll
  for (int r = 0; r < kRows; ++r) x[r] = p.x + min(row + r, p.m - 1) * p.x_stride + lane;
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    w[g] = p.weight + int64_t{min(head + g, p.num_kv_heads - 1)} * p.hidden + lane;
  }
  float sums[kRows][kHeads] = {};
#pragma unroll(kAhead)
  for (int h = lane; h < p.hidden; h += 16) {
    float weights[kHeads];
#pragma unroll
    for (int g = 0; g < kHeads; ++g) weights[g] = w[g][h - lane];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float value = Value(x[r][h - lane]);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        sums[r][g] = __fadd_rn(sums[r][g], __fmul_rn(value, weights[g]));
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      float sum = sums[r][g];
#pragma unroll
      for (int width = 8; width > 0; width /= 2) {
        sum = __fadd_rn(sum, __shfl_down_sync(0xffffffffu, sum, width, 16));
      }
      if (lane != 0 || row + r >= p.m || head + g >= p.num_kv_heads) continue;
      if (p.bias != nullptr) sum = __fadd_rn(sum, p.bias[head + g]);
      p.out[int64_t{row + r} * p.num_kv_heads + head + g] = sum;
    }
  }
}

template <int kRows, int kHeads, int kAhead>
absl::Status Enqueue(const DmsLogitsCudaParams& p, cudaStream_t stream) {
  constexpr int kBlockRows = kHalfWarps * kRows;
  const dim3 grid(static_cast<unsigned>((p.m + kBlockRows - 1) / kBlockRows),
                  static_cast<unsigned>((p.num_kv_heads + kHeads - 1) / kHeads));
  LogitsKernel<kRows, kHeads, kAhead><<<grid, kThreads, 0, stream>>>(p);
  return CudaStatus(cudaGetLastError());
}

}  // namespace

absl::Status ValidateDmsLogitsCuda(const DmsLogitsCudaParams& p) {
  if (p.m < 0 || p.hidden < 1 || p.num_kv_heads < 1 || p.num_kv_heads > 65535 ||
      p.x_stride < p.hidden) {
    return absl::InvalidArgumentError(absl::StrCat("dms_logits: m=", p.m, " hidden=", p.hidden,
                                                   " num_kv_heads=", p.num_kv_heads,
                                                   " x_stride=", p.x_stride));
  }
  if (p.x == nullptr || p.weight == nullptr || p.out == nullptr) {
    return absl::InvalidArgumentError("dms_logits: x, weight or out is null");
  }
  return absl::OkStatus();
}

absl::Status LaunchDmsLogits(const DmsLogitsCudaParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsLogitsCuda(params));
  if (params.m == 0) return absl::OkStatus();
  return params.m <= kFewRows ? Enqueue<1, 1, 32>(params, stream)
                              : Enqueue<4, 8, 4>(params, stream);
}

}  // namespace winnow::kernels
