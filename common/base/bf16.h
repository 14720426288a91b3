#pragma once

#include <bit>
#include <cstdint>

namespace winnow {

// Bit pattern of a bfloat16. Same size and layout as CUDA's __nv_bfloat16, so
// that headers which name it compile without the CUDA toolkit.
struct Bf16 {
  uint16_t bits = 0;
  friend bool operator==(const Bf16&, const Bf16&) = default;
};
static_assert(sizeof(Bf16) == 2);

// Rounds to nearest, ties to even; NaN stays NaN.
inline Bf16 ToBf16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return Bf16{static_cast<uint16_t>((u >> 16) | 0x0040u)};
  const uint32_t rounding = 0x7fffu + ((u >> 16) & 1u);
  return Bf16{static_cast<uint16_t>((u + rounding) >> 16)};
}

inline float ToFloat(Bf16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

// `value` rounded to the nearest BF16, as a float.
inline float RoundToBf16(float value) { return ToFloat(ToBf16(value)); }

}  // namespace winnow
