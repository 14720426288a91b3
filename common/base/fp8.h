#pragma once

#include <cstdint>

namespace winnow {

// FP8 e4m3 ("fn": no infinities, largest finite value 448, NaN 0x7f/0xff), as
// defined in Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
inline constexpr float kE4m3Max = 448.0f;

// Rounds to nearest, ties to even; saturates to +-448; NaN stays NaN.
uint8_t ToE4m3(float value);
float E4m3ToFloat(uint8_t code);

// IEEE binary16. Rounds to nearest, ties to even; overflow becomes infinity.
uint16_t ToHalf(float value);
float HalfToFloat(uint16_t bits);

}  // namespace winnow
