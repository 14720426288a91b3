#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// A head's vector in eight lanes: lane l has channels 16 i + 2 l and 16 i + 2 l + 1 as x[i].
// So halves that RoPE pairs are one lane's. All operations are rounded where the CPU's are.
namespace winnow::kernels::internal {

template <int kDim>
using HeadVector = float2[kDim / 16];

// cos, sin: the lane's channels of one row of the table.
template <int kDim>
__device__ __forceinline__ void RopeVector(const float2 (&cos)[kDim / 32],
                                           const float2 (&sin)[kDim / 32], HeadVector<kDim>& x) {
  constexpr int kHalf = kDim / 32;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float2 a = x[i], b = x[i + kHalf], c = cos[i], s = sin[i];
    x[i].x = __fsub_rn(__fmul_rn(a.x, c.x), __fmul_rn(b.x, s.x));
    x[i].y = __fsub_rn(__fmul_rn(a.y, c.y), __fmul_rn(b.y, s.y));
    x[i + kHalf].x = __fadd_rn(__fmul_rn(b.x, c.x), __fmul_rn(a.x, s.x));
    x[i + kHalf].y = __fadd_rn(__fmul_rn(b.y, c.y), __fmul_rn(a.y, s.y));
  }
}

// HadamardRotate(): the product, then butterflies of width 1, 2, 4, ... All lanes of the warp.
template <int kDim>
__device__ __forceinline__ void RotateVector(int lane, HeadVector<kDim>& x) {
  constexpr int kPairs = kDim / 16;
  constexpr float kScale = kDim == 64 ? 0.125f : 0x1.6a09e6p-4f;  // 1 / sqrt(kDim)
  static_assert(kDim == 64 || kDim == 128);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float a = __fmul_rn(x[i].x, kScale), b = __fmul_rn(x[i].y, kScale);
    x[i] = make_float2(__fadd_rn(a, b), __fsub_rn(a, b));
  }
#pragma unroll
  for (int half = 1; half < 8; half *= 2) {
    const float sign = (lane & half) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = __shfl_xor_sync(0xffffffffu, x[i].x, half);
      const float b = __shfl_xor_sync(0xffffffffu, x[i].y, half);
      x[i].x = __fmaf_rn(x[i].x, sign, a);  // the product is exact: a sum or a difference
      x[i].y = __fmaf_rn(x[i].y, sign, b);
    }
  }
#pragma unroll
  for (int half = 1; half < kPairs; half *= 2) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if ((i & half) != 0) continue;
      const float2 a = x[i], b = x[i + half];
      x[i] = make_float2(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y));
      x[i + half] = make_float2(__fsub_rn(a.x, b.x), __fsub_rn(a.y, b.y));
    }
  }
}

}  // namespace winnow::kernels::internal
