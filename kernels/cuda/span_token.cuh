#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/kv_format.h"

// Stored tokens in pages and flat rows, moved as they are.
namespace winnow::kernels::device {

// K and V have elements of one size; that of `kK`.
template <KvElement kK, int kDim>
struct TokenShape {
  static constexpr int kRowBytes = kDim * static_cast<int>(KvElementBytes(kK));  // of K, and of V
  static constexpr bool kScaled = kK != KvElement::kBf16;
  static constexpr int kPageBytes = static_cast<int>(PageBytes(kDim));
  static constexpr int kSlots = kPageBytes / (2 * kRowBytes + (kScaled ? 4 : 0));
};

// Where a stored token lies: in a page, or a flat row (slots 1, slot 0).
struct Place {
  uint8_t* base;
  int slots, slot;
};

// kLanes lanes copy a token's parts; a lane always the same bytes, all of them read before
// one is written.
template <typename T, int kLanes = 32>
__device__ __forceinline__ void CopyToken(const Place& from, const Place& to, int lane) {
  constexpr int kTurns = (T::kRowBytes + 4 * kLanes - 1) / (4 * kLanes);
  const auto elements = [lane](const Place& p, int part, int turn) {
    return reinterpret_cast<uint32_t*>(p.base + (part * p.slots + p.slot) * T::kRowBytes) +
           turn * kLanes + lane;
  };
  const auto scale = [lane](const Place& p) {
    return reinterpret_cast<uint16_t*>(p.base + p.slots * 2 * T::kRowBytes +
                                       (lane * p.slots + p.slot) * 2);
  };
  const bool has_scale = T::kScaled && lane < 2;
  uint32_t words[2][kTurns];
  uint16_t scale_bits = 0;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const bool there = 4 * (turn * kLanes + lane) < T::kRowBytes;
      words[part][turn] = there ? *elements(from, part, turn) : 0;
    }
  }
  if (has_scale) scale_bits = *scale(from);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (4 * (turn * kLanes + lane) < T::kRowBytes) *elements(to, part, turn) = words[part][turn];
    }
  }
  if (has_scale) *scale(to) = scale_bits;
}

}  // namespace winnow::kernels::device
