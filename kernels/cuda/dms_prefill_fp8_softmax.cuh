#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/dms_prefill_fp8_produce.cuh"
#include "kernels/cuda/dms_prefill_fp8_scales.h"

// From products of codes to e4m3 weights, in a thread's registers, two float16 at a time.
//
// A score s of key j is <q codes, k codes>, and z = (s * ks_j + shift) * unit + log2 vs_j in
// units of kFp8PerOctave; shift and unit are the row's. 127 z, cut to [0, 127] and rounded, is
// the code of the weight: an e4m3 code is 8 (i + 7) + 8 f for 2^i (1 + f), so this takes 1 + f
// for 2^f. V's scale vs_j is inside, so that e4m3's range is spent on what counts, the product.
// The sum of weights, out of the tensor cores, takes vs_j out again: PrefillFp8SumCodes().
namespace winnow::kernels::internal {

#if WINNOW_SM90A

// The even bits of x, then the odd ones.
__device__ __forceinline__ uint32_t EvenThenOdd(uint32_t x) {
  const auto swap = [&](uint32_t mask, int by) {  // the bits of mask with those `by` above
    const uint32_t differ = (x ^ x >> by) & mask;
    x ^= differ | differ << by;
  };
  swap(0x22222222u, 1);
  swap(0x0c0c0c0cu, 2);
  swap(0x00f000f0u, 4);
  swap(0x0000ff00u, 8);
  return x;
}

// s[2 j + r] is row r (of the thread's two), keys 8 j + 2 (lane % 4) + {0, 1}. Sets what a row
// does not see to -infinity: bit n of seen[r] is key 8 (n / 2) + n % 2 of the thread.
__device__ __forceinline__ void MaskScoresFp8(uint32_t (&s)[32], const uint32_t (&seen)[2]) {
  const uint32_t bits[2] = {EvenThenOdd(seen[0]), EvenThenOdd(seen[1])};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const uint32_t mask = (bits[i % 2] >> (i / 2) & 0x00010001u) * 0xffffu;
    s[i] = (s[i] & mask) | (~mask & 0xfc00fc00u);
  }
}

// The running softmax of a thread's two rows; both halves of a word are the same.
struct Fp8Softmax {
  // The code to which a row's largest is brought; 127, which is past all codes, is 22 / 8 octaves
  // more. At 1 / 8 octave 1 + f is above 2^f by 3.2 %, about the mean of all f.
  static constexpr float kTop = 105.0f / 127.0f;
  uint32_t unit[2], shift[2];

  __device__ __forceinline__ void Reset(float unit0, float unit1) {
    unit[0] = ptx::PackF16(unit0, unit0);
    unit[1] = ptx::PackF16(unit1, unit1);
    shift[0] = shift[1] = 0x7bff7bffu;  // the largest
  }

  // Lowers the shifts until no exponent is above kTop; returns by what earlier outputs shrink.
  __device__ __forceinline__ float2 Raise(const uint32_t (&s)[32], const uint16_t* scales) {
    const auto* fours = reinterpret_cast<const uint4*>(scales) + threadIdx.x % 4;
    uint32_t most[2] = {0xfc00fc00u, 0xfc00fc00u};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint4 c = fours[4 * n];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t a = ptx::Mul2(s[4 * n + r], c.x), b = ptx::Mul2(s[4 * n + 2 + r], c.z);
        most[r] = ptx::Max2(most[r], ptx::Fma2(a, unit[r], c.y));
        most[r] = ptx::Max2(most[r], ptx::Fma2(b, unit[r], c.w));
      }
    }
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = ptx::Max2(most[r], __shfl_xor_sync(~0u, most[r], 1));
      most[r] = ptx::Max2(most[r], __shfl_xor_sync(~0u, most[r], 2));
      const float2 pair = ptx::UnpackF16(most[r]);
      const float by = ptx::UnpackF16(unit[r]).x, before = ptx::UnpackF16(shift[r]).x;
      const float now = (kTop - fmaxf(pair.x, pair.y)) * ptx::Reciprocal(by);
      shrink[r] = 1.0f;
      if (now < before) {
        shift[r] = ptx::PackF16(now, now);
        shrink[r] = ptx::Exp2((ptx::UnpackF16(shift[r]).x - before) * by * (1.0f / kFp8PerOctave));
      }
    }
    return make_float2(shrink[0], shrink[1]);
  }

  // Scores to weights, as A fragments of 64 rows times 128 keys in the order of
  // PrefillFp8ValueByte(). Returns whether one is past e4m3's range, and so a NaN.
  __device__ __forceinline__ bool Weigh(const uint32_t (&s)[32], const uint16_t* scales,
                                        uint32_t (&p)[16]) const {
    const auto* fours = reinterpret_cast<const uint4*>(scales) + threadIdx.x % 4;
    uint32_t past = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {  // 16 keys
      const uint4 c = fours[4 * n];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t a = ptx::FmaSaturated2(ptx::Fma2(s[4 * n + r], c.x, shift[r]), unit[r], c.y);
        const uint32_t b =
            ptx::FmaSaturated2(ptx::Fma2(s[4 * n + 2 + r], c.z, shift[r]), unit[r], c.w);
        // 127 and 1024: what is left of a sum from 1024 on are whole numbers.
        p[2 * n + r] = __byte_perm(ptx::Fma2(a, 0x57f057f0u, 0x64006400u),
                                   ptx::Fma2(b, 0x57f057f0u, 0x64006400u), 0x6420);
        past |= p[2 * n + r] + 0x01010101u;
      }
    }
    return (past & 0x80808080u) != 0;
  }
};

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
