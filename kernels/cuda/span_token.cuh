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

// kLanes lanes copy a token's parts; a lane always the same bytes.
template <typename T, int kLanes = 32>
__device__ __forceinline__ void CopyToken(const Place& from, const Place& to, int lane) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const uint8_t* in = from.base + (part * from.slots + from.slot) * T::kRowBytes;
    uint8_t* out = to.base + (part * to.slots + to.slot) * T::kRowBytes;
#pragma unroll
    for (int i = lane * 4; i < T::kRowBytes; i += 4 * kLanes) {
      *reinterpret_cast<uint32_t*>(out + i) = *reinterpret_cast<const uint32_t*>(in + i);
    }
  }
  if (T::kScaled && lane < 2) {
    const auto scale = [lane](const Place& p) {
      return p.base + p.slots * 2 * T::kRowBytes + (lane * p.slots + p.slot) * 2;
    };
    *reinterpret_cast<uint16_t*>(scale(to)) = *reinterpret_cast<const uint16_t*>(scale(from));
  }
}

}  // namespace winnow::kernels::device
