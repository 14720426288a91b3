#pragma once

#include "kernels/cuda/gemv_e4m3_shared.cuh"

// How x becomes the other operand of e4m3 weights: each row's chunk of 128 BF16, in place, two
// columns of e4m3.
namespace winnow::kernels::internal {

#if WINNOW_SM90A

// One thread's: x as it is into slots, as they are free.
template <typename S, int kWide>
__device__ __forceinline__ void CopyX(const E4m3Block<S, kWide>& b, const CUtensorMap* map) {
  ptx::PrefetchMap(map);
  ptx::WaitForPredecessors();
  ptx::RingPlace slot;
  int step = 0;
  for (int left = b.held ? b.steps : b.Tiles() * b.steps; left > 0; --left) {
    uint64_t* raw = &b.barriers->x_raw[slot.at];
    ptx::BarrierWait(&b.barriers->x_empty[slot.at], slot.parity ^ 1);
    ptx::BarrierArriveExpect(raw, b.kSlot);
    uint8_t* to = b.x + slot.at * b.kSlot;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const int k = (step * kWide + i) * kE4m3Chunk;
      if (b.a.whole_parts) {
        ptx::LoadBox3(to, map, raw, k, 0, b.rank * S::kUnits);
        to += S::kXBytes;
        continue;
      }
      for (int unit = 0; unit < S::kUnits; ++unit, to += S::kXBytes / S::kUnits) {
        ptx::LoadBox2(to, map, raw, b.FirstK(unit) + k, 0);
      }
    }
    if (++step == b.steps) step = 0;
    slot.Next(b.a.slots);
  }
}

// The largest |x| of both halves; NaN if one is.
__device__ __forceinline__ uint32_t LargestBf16(uint32_t a, uint32_t b) {
  uint32_t largest;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
  return largest;
}

// Two BF16 times `scale` as e4m3: `hi` of them, rounded, `lo` of the rest.
__device__ __forceinline__ void SplitPair(uint32_t x, float scale, uint16_t* hi, uint16_t* lo) {
  const uint32_t both =
      ptx::PackF16(__uint_as_float(x << 16) * scale, __uint_as_float(x & 0xffff0000u) * scale);
  uint32_t back;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(*hi) : "r"(both));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(back) : "h"(*hi));
  const uint32_t rest = ptx::Fma2(back, 0xbc00bc00u, both);  // -1: both - back
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(*lo) : "r"(rest));
}

// A slot of x, split in place: x times a power of two, which brings the largest of a row's chunk to
// [2^7, 2^8), is hi, rounded to e4m3's four significant bits, plus lo. That is exact down to 2^-9
// of the largest, and off by 2^-17 of it below (2^-136 if that is more: the power ends at 2^126).
// `factors` [kWide][kPairs]: one over the power. What is not finite makes its row NaN, by the
// factor.
template <typename S, int kWide>
__device__ __forceinline__ void SplitX(uint8_t* slot, float* factors, int warp, int lane) {
  constexpr int kPairs = kWide * S::kPairs;
  const int column = lane % 8;
#pragma unroll
  for (int first = 0; first < kPairs; first += 4 * S::kXWarps) {
    const int pair = first + 4 * warp + lane / 8;
    if (4 * S::kXWarps > kPairs && 4 * warp >= kPairs) break;
    uint8_t* row = slot + 256 * pair;
    const uint4 v[2] = {*reinterpret_cast<const uint4*>(row + 32 * column),
                        *reinterpret_cast<const uint4*>(row + 32 * column + 16)};
    const uint32_t words[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
    uint32_t top[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i] = LargestBf16(words[2 * i], words[2 * i + 1]);
    const uint32_t both = LargestBf16(LargestBf16(top[0], top[1]), LargestBf16(top[2], top[3]));
    uint32_t largest = max(both >> 16 & 0x7fffu, both & 0x7fffu);
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    const int shift = min(134 - static_cast<int>(largest >> 7), 126);
    const float scale = __int_as_float((127 + shift) << 23);
    uint16_t hi[8], lo[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) SplitPair(words[i], scale, &hi[i], &lo[i]);
    const auto pack = [](const uint16_t(&c)[8]) {
      return make_uint4(c[0] | uint32_t{c[1]} << 16, c[2] | uint32_t{c[3]} << 16,
                        c[4] | uint32_t{c[5]} << 16, c[6] | uint32_t{c[7]} << 16);
    };
    __syncwarp();  // all lanes' words have been read
    *reinterpret_cast<uint4*>(row + 16 * (column ^ (2 * pair & 7))) = pack(hi);
    *reinterpret_cast<uint4*>(row + 128 + 16 * (column ^ ((2 * pair + 1) & 7))) = pack(lo);
    if (column == 0) {
      factors[pair] = __int_as_float(largest >= 0x7f80u ? 0x7fffffff : (127 - shift) << 23);
    }
  }
}
#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
