#include "common/base/fp8.h"

#include <bit>
#include <cmath>

namespace winnow {

uint8_t ToE4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return sign | 0x7f;
  const float magnitude = std::fabs(value);
  if (magnitude >= kE4m3Max) return sign | 0x7e;
  // Below 2^-6 the spacing is 2^-9; above, 2^(exponent - 3). nearbyint() rounds
  // ties to even in the default rounding mode.
  int exponent = 0;
  if (magnitude >= 0x1p-6f) exponent = std::ilogb(magnitude);
  if (magnitude < 0x1p-6f) {
    const int code = static_cast<int>(std::nearbyint(magnitude * 0x1p9f));  // 8 is 2^-6 itself
    return sign | static_cast<uint8_t>(code);
  }
  int mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));  // [8, 16]
  if (mantissa == 16) {
    mantissa = 8;
    ++exponent;
  }
  const int code = ((exponent + 7) << 3) | (mantissa - 8);
  return sign | static_cast<uint8_t>(code > 0x7e ? 0x7e : code);
}

float E4m3ToFloat(uint8_t code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  float magnitude;
  if ((code & 0x7f) == 0x7f) {
    magnitude = std::bit_cast<float>(0x7fc00000u);
  } else if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-9f;
  } else {
    magnitude = std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  }
  return (code & 0x80) ? -magnitude : magnitude;
}

uint16_t ToHalf(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t abs = u & 0x7fffffffu;
  if (abs > 0x7f800000u) return sign | 0x7e00;
  if (abs >= 0x477ff000u) return sign | 0x7c00;  // rounds to 65536 or more
  if (abs < 0x38800000u) {                       // below 2^-14: subnormal, spacing 2^-24
    const float scaled = std::bit_cast<float>(abs) * 0x1p24f;
    return sign | static_cast<uint16_t>(std::nearbyint(scaled));
  }
  const uint32_t rounded = abs + 0x0fffu + ((abs >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

float HalfToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 31u;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

}  // namespace winnow
