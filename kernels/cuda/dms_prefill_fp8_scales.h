#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>

// What the FP8 prefill lays down beside a row's codes, from the row's two scales (float16).
namespace winnow::kernels::internal {

// Exponents of the softmax are in these units: the number of e4m3 codes is 127 of them.
inline constexpr float kFp8PerOctave = 8.0f / 127.0f;

struct PrefillFp8Scales {
  uint16_t k;  // K's scale
  uint16_t v;  // log2 of V's scale, in units of the exponent
};

// Float16 as float; a scale that is not finite, and so of a row that is not, as a NaN.
__host__ __device__ inline float PrefillFp8Scale(uint16_t half) {
  return __half2float(__half(__half_raw{half}));
}

// By how many octaves a row's codes of V are made smaller and its scale larger, so that this is at
// least a quarter of `largest`, the largest of the rows stored with it: what counts in sums
// of weights must not vanish because V is small. Only codes below e4m3's normal range lose bits.
__host__ __device__ inline int PrefillFp8Octaves(float v_scale, float largest) {
  int octaves = 0;
  if (v_scale > 0.0f) {
    while (v_scale < 0.25f * largest) {
      v_scale *= 2.0f;
      ++octaves;
    }
  }
  return octaves;
}
__host__ __device__ inline uint8_t PrefillFp8ShiftCode(uint8_t code, int octaves) {
  const float x =
      __half2float(__half(__nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t{code}, __NV_E4M3)));
  return __nv_cvt_float_to_fp8(ldexpf(x, -octaves), __NV_SATFINITE, __NV_E4M3);
}

// If a scale is a NaN: what makes any row that sees the key NaN.
__host__ __device__ inline PrefillFp8Scales PrefillFp8ScalesOf(uint16_t k, float v) {
  if ((k & 0x7fff) > 0x7c00 || !(v < INFINITY)) return {.k = 1, .v = 0x7c00};
  return {.k = k, .v = __half_raw(__float2half_rn(log2f(v) * kFp8PerOctave)).x};
}

// Codes of 1 / V's scale in the eight channels of sums: the inverse has one of four ranges of
// 10 octaves, 2^(10 i - 16) to 2^(10 i - 6), the last one with its end. Channel 2 i is
// 2^(14 - 10 i) of it, from 1/4 to 256; channel 2 i + 1 is 16 times what that is off by.
__host__ __device__ inline uint2 PrefillFp8SumCodes(float v) {
  if (!(v > 0.0f)) return make_uint2(0, 0);
  const float inverse = 1.0f / v;
  int range = 0;
  for (int i = 1; i < 4; ++i) range += inverse >= ldexpf(1.0f, 10 * i - 16) ? 1 : 0;
  const float x = ldexpf(inverse, 14 - 10 * range);
  const auto code = [](float y) {
    return static_cast<uint32_t>(__nv_cvt_float_to_fp8(y, __NV_SATFINITE, __NV_E4M3));
  };
  const uint32_t high = code(x);
  const float rounded = __half2float(
      __half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(high), __NV_E4M3)));
  const uint32_t pair = high | code((x - rounded) * 16.0f) << 8;
  const uint32_t word = pair << (range % 2 * 16);
  return range < 2 ? make_uint2(word, 0) : make_uint2(0, word);
}
// By what a sum over channel 2 i counts; one over channel 2 i + 1 a sixteenth of that.
__host__ __device__ inline float PrefillFp8SumFactor(int range) {
  return ldexpf(1.0f, 10 * range - 14);
}

}  // namespace winnow::kernels::internal
