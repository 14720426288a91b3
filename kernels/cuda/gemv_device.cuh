#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <cstring>

#include "kernels/cuda/gemv.h"
#include "kernels/cuda/ptx.cuh"

// What the weight-streaming kernels share. Weights come in tiles of 16 rows: the A operand of
// mma.m16n8k16, whose columns are the rows of x.
namespace winnow::kernels::device {

inline constexpr int kGemvTileRows = 16;

// The lower / upper two e4m3 codes of `w` as two BF16, exact (0x7f and 0xff, never stored, are
// +-480): as a BF16 the same sign, exponent and mantissa bits are worth 2^-120 of it.
template <int kHalf>
__device__ __forceinline__ uint32_t E4m3PairToBf16(uint32_t w) {
  const uint32_t x = __byte_perm(w, 0, kHalf == 0 ? 0x1404 : 0x3424);
  const uint32_t bits = (x & 0x80008000u) | ((x >> 4) & 0x07f007f0u);
  constexpr uint32_t kTwoTo120 = 0x7b807b80u;
  __nv_bfloat162 value, factor;
  memcpy(&value, &bits, 4);
  memcpy(&factor, &kTwoTo120, 4);
  value = __hmul2(value, factor);
  uint32_t out;
  memcpy(&out, &value, 4);
  return out;
}

// Row of w behind row `r` of a tile, -1 past the end. kSiluMul pairs eight gate rows with the
// eight up rows of the same columns.
__device__ __forceinline__ int GemvRow(const GemvParams& p, int tile, int r) {
  if (p.epilogue == GemvEpilogue::kSiluMul) {
    const int column = 8 * tile + r % 8;
    return column < p.n / 2 ? column + (r < 8 ? 0 : p.n / 2) : -1;
  }
  const int row = kGemvTileRows * tile + r;
  return row < p.n ? row : -1;
}

// Four consecutive rows of a tile: what the epilogue reads besides the sums.
struct GemvQuad {
  float scale[4], old[4];
};
__device__ __forceinline__ void LoadScales(const GemvParams& p, int tile, int quad, GemvQuad* q) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = GemvRow(p, tile, 4 * quad + j);
    q->scale[j] = p.w_scale != nullptr && row >= 0 ? p.w_scale[row] : 1.0f;
  }
}
__device__ __forceinline__ void LoadOld(const GemvParams& p, int tile, int m, int quad,
                                        GemvQuad* q) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = GemvRow(p, tile, 4 * quad + j);
    q->old[j] = p.epilogue == GemvEpilogue::kAdd && row >= 0 ? p.out_f32[m * p.ldo + row] : 0.0f;
  }
}

// Writes the quad's outputs; the lanes of a warp hold quads (lane % 4) of rows lane / 4 of x, and
// all get here. `store`: the lane's row of x exists.
__device__ __forceinline__ void FinishGemvQuad(const GemvParams& p, int tile, int m, int quad,
                                               const GemvQuad& q, float (&y)[4], bool store) {
#pragma unroll
  for (int j = 0; j < 4; ++j) y[j] *= q.scale[j];
  if (p.epilogue == GemvEpilogue::kAdd) {
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = q.old[j] + y[j];
  }
  if (p.epilogue == GemvEpilogue::kSiluMul) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float up = __shfl_down_sync(0xffffffffu, y[j], 2);
      y[j] = y[j] / (1.0f + expf(-y[j])) * up;
    }
    store = store && quad < 2;
  }
  if (!store) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = GemvRow(p, tile, 4 * quad + j);
    if (row < 0) continue;
    const int64_t at = m * p.ldo + row;
    if (p.out_f32 != nullptr) {
      p.out_f32[at] = y[j];
    } else {
      p.out_bf16[at].bits = static_cast<uint16_t>(ptx::PackBf16(y[j], 0.0f));
    }
  }
}

}  // namespace winnow::kernels::device
