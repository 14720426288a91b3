#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "kernels/cuda/dms_prefill_fp8_produce.cuh"

// From products of codes to e4m3 weights, in a thread's registers.
namespace winnow::kernels::internal {

#if WINNOW_SM90A

// Element 4 j + 2 r + e of a thread's scores is row r (of its two), key 8 j + 2 (lane % 4) + e.
// Products of codes become log2 of the weights times V's scale.
__device__ __forceinline__ void ScaleScores(float (&s)[32], const float* scales, float q_scale) {
  const auto* pairs = reinterpret_cast<const float4*>(scales) + threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 c = pairs[4 * j];
    const float a = c.x * q_scale, b = c.z * q_scale;
    s[4 * j] = fmaf(s[4 * j], a, c.y);
    s[4 * j + 1] = fmaf(s[4 * j + 1], b, c.w);
    s[4 * j + 2] = fmaf(s[4 * j + 2], a, c.y);
    s[4 * j + 3] = fmaf(s[4 * j + 3], b, c.w);
  }
}

// Sets what a row does not see to -infinity; `offset` of the rows' positions, from list
// key w.band_start.
__device__ __forceinline__ void MaskScoresFp8(float (&s)[32], const Fp8TileWork& w, int first_key,
                                              const int (&offset)[2], const PrefillFp8Args& args) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int32_t* marks = args.scratch.marks + int64_t{w.head} * args.band_rows + w.band_row;
  // Bit c of the two words: key c is seen whatever the window (survivor, or band and kept).
  uint32_t kept[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = first_key + 32 * i + lane;
    const bool in_band = key >= w.band_start && key < w.num_keys;
    const bool bit = key < w.num_survivors || (in_band && (marks[key - w.padded] & 1) != 0);
    kept[i] = __ballot_sync(~0u, bit) >> (2 * (lane % 4));
  }
  const int shift = w.band_start - first_key - 2 * (lane % 4);  // its column, from ours
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int newest = shift + offset[r];
    const int oldest = shift + max(0, offset[r] - args.window);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + e;
        const bool always = (kept[j / 4] >> (8 * (j % 4) + e) & 1) != 0;
        const bool seen = column <= newest && (column >= oldest || always);
        if (!seen) s[4 * j + 2 * r + e] = -INFINITY;
      }
    }
  }
}

// The running softmax of a thread's two rows.
struct Fp8Softmax {
  // A weight is 2^(exponent - reference + 7). A reference may lag its row's largest
  // exponent as long as e4m3 holds the weights.
  float reference[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};

  // Exponents to weights, as A fragments of 64 rows times 64 keys in the order of
  // PrefillFp8ValueByte(). Returns whether one may be past e4m3's range.
  __device__ __forceinline__ bool Pack(const float (&x)[32], const float* inverses,
                                       uint32_t (&p)[8], float (&sums)[2]) const {
    const float base[2] = {reference[0] - 7.0f, reference[1] - 7.0f};
    const auto* pairs = reinterpret_cast<const float2*>(inverses) + threadIdx.x % 4;
    float even[2] = {sum[0], sum[1]}, odd[2] = {0.0f, 0.0f};
    uint32_t past = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 16 keys
      const float2 a = pairs[8 * i], b = pairs[8 * i + 4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* from = x + 8 * i + 2 * r;
        const float w0 = ptx::Exp2(from[0] - base[r]), w1 = ptx::Exp2(from[1] - base[r]);
        const float w2 = ptx::Exp2(from[4] - base[r]), w3 = ptx::Exp2(from[5] - base[r]);
        even[r] = fmaf(w0, a.x, even[r]);
        odd[r] = fmaf(w1, a.y, odd[r]);
        even[r] = fmaf(w2, b.x, even[r]);
        odd[r] = fmaf(w3, b.y, odd[r]);
        p[2 * i + r] = ptx::PackE4m3(w0, w1, w2, w3);
        past |= p[2 * i + r] + 0x02020202u;  // a code from 0x7e (448) on sets its highest bit
      }
    }
    sums[0] = even[0] + odd[0];
    sums[1] = even[1] + odd[1];
    return (past & 0x80808080u) != 0;
  }
  // Moves the references of the warp's rows up to their largest exponents. Earlier
  // outputs of the thread then shrink by `shrink`, as does `sum` here.
  __device__ __forceinline__ void Follow(const float (&x)[32], float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = reference[r];
#pragma unroll
      for (int j = 0; j < 8; ++j) m = fmaxf(m, fmaxf(x[4 * j + 2 * r], x[4 * j + 2 * r + 1]));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      shrink[r] = ptx::Exp2(reference[r] - m);
      reference[r] = m;
      sum[r] *= shrink[r];
    }
  }
};

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
