#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/kv_format.h"

// kv_format.h's StoreRow() of one K or V by eight lanes, to the same bits. Lane l of the
// eight holds dims 16 i + 2 l and 16 i + 2 l + 1, so that the error's sixteen partial
// sums are the CPU's.
namespace winnow::kernels::internal {

struct Quarter {
  int lane;       // in the eight
  uint32_t mask;  // of the eight in the warp
};

inline __device__ uint32_t MaxOfQuarter(uint32_t x, const Quarter& quarter) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) x = max(x, __shfl_xor_sync(quarter.mask, x, step));
  return x;
}

inline __device__ float FromHalf(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
inline __device__ uint16_t RoundToHalf(float x) { return __half_as_ushort(__float2half_rn(x)); }

// Codes of two values, and the values that codes stand for.
__device__ __forceinline__ uint32_t E4m3Pair(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ float2 E4m3Values(uint32_t pair) {
  return __half22float2(
      __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3)));
}
__device__ __forceinline__ int Int8Code(float x) {
  return __float2int_rn(fminf(fmaxf(x, -127.0f), 127.0f));
}

// 1 / s correctly rounded; s is a float16 above 0, or NaN.
inline __device__ float Reciprocal(float s) {
  float approximate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(approximate) : "f"(s));
  return __fmaf_rn(approximate, -__fmaf_rn(s, approximate, -1.0f), approximate);
}

// x / s correctly rounded, `inverse` being 1 / s correctly rounded, wherever a code's rounding
// can tell. s has at most 11 bits, so the residual is exact and no quotient is a tie of
// float32; the nearest to one is off by 2^-12 of a unit, the second product by 2^-23 of it.
// Keeps the sign of a zero.
inline __device__ float Divide(float x, float s, float inverse) {
  const float q = __fmul_rn(x, inverse);
  return __fmaf_rn(-__fmaf_rn(q, s, -x), inverse, q);
}

// The larger magnitude, NaN if one is.
inline __device__ float MaxOfMagnitudes(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(fabsf(a)), "f"(fabsf(b)));
  return most;
}

// kv_format's ScaleFor(); quotient(x) is x / max_code, rounded as float16 cannot tell from the
// correctly rounded one.
template <typename Quotient>
__device__ uint16_t ScaleFor(uint32_t amax_bits, float max_code, Quotient quotient) {
  constexpr uint16_t kHalfNan = 0x7e00, kHalfMax = 0x7bff;
  if (amax_bits >= 0x7f800000u) return kHalfNan;
  const float amax = __uint_as_float(amax_bits);
  uint16_t scale = min(RoundToHalf(quotient(amax)), kHalfMax);
  if (scale == 0 || (scale < kHalfMax && __fmul_rn(FromHalf(scale), max_code) < amax)) ++scale;
  return scale;
}

// A scale that a vector may take.
struct Candidate {
  uint32_t half;  // its bits
  float scale, inverse;
};
__device__ __forceinline__ Candidate MakeCandidate(uint32_t half) {
  const float scale = FromHalf(static_cast<uint16_t>(half));
  return {.half = half, .scale = scale, .inverse = Reciprocal(scale)};
}
// The other one that E4m3ScaleFor() looks at: sqrt(2) times the smallest.
__device__ __forceinline__ Candidate OtherE4m3Candidate(const Candidate& smallest) {
  return MakeCandidate(
      min(uint32_t{RoundToHalf(__fmul_rn(smallest.scale, 1.41421356237309504880f))}, 0x7bffu));
}

// kv_format's E4m3ScaleFor(): `smallest` or the other. `sums` [2][16] is the eight lanes' own.
template <int kPairs>
__device__ Candidate BetterE4m3Scale(const float2 (&x)[kPairs], const Candidate& smallest,
                                     const Quarter& quarter, float* sums) {
  const Candidate other = OtherE4m3Candidate(smallest);
#pragma unroll
  for (int candidate = 0; candidate < 2; ++candidate) {
    const float inverse = candidate == 0 ? smallest.inverse : other.inverse;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = __fmul_rn(x[i].x, inverse), b = __fmul_rn(x[i].y, inverse);
      const float2 rounded = E4m3Values(E4m3Pair(a, b));
      const float ea = __fsub_rn(a, rounded.x), eb = __fsub_rn(b, rounded.y);
      sum.x = __fadd_rn(sum.x, __fmul_rn(ea, ea));
      sum.y = __fadd_rn(sum.y, __fmul_rn(eb, eb));
    }
    *reinterpret_cast<float2*>(sums + 16 * candidate + 2 * quarter.lane) = sum;
  }
  __syncwarp(quarter.mask);
  // Even lanes add up the first candidate's sums in order, odd ones the second's.
  const int mine = quarter.lane & 1;
  const float4* parts = reinterpret_cast<const float4*>(sums + 16 * mine);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 part = parts[i];
    total = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(total, part.x), part.y), part.z), part.w);
  }
  const float scale = mine == 0 ? smallest.scale : other.scale;
  total = __fmul_rn(__fmul_rn(total, scale), scale);
  const float others = __shfl_xor_sync(quarter.mask, total, 1);
  __syncwarp(quarter.mask);  // the sums are read
  const bool take_other = mine == 0 ? others < total : total < others;
  return take_other ? other : smallest;
}

// Quantizes the eight lanes' vector: its codes and scale go to the staged row, and x
// becomes what they stand for.
template <KvElement kElement, int kPairs>
__device__ void StoreVector(float2 (&x)[kPairs], const Quarter& quarter, float* sums,
                            uint8_t* codes_out, uint8_t* scale_out) {
  if constexpr (kElement == KvElement::kBf16) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      *reinterpret_cast<uint32_t*>(codes_out + 4 * (8 * i + quarter.lane)) =
          ptx::PackBf16(x[i].x, x[i].y);
    }
  } else {
    constexpr float kMaxCode = KvElementTraits<kElement>::kMaxCode;
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      most = MaxOfMagnitudes(most, MaxOfMagnitudes(x[i].x, x[i].y));
    }
    const uint16_t smallest =
        ScaleFor(MaxOfQuarter(__float_as_uint(most), quarter), kMaxCode,
                 [](float amax) { return Divide(amax, kMaxCode, 1.0f / kMaxCode); });
    const bool finite = smallest != 0x7e00;  // otherwise codes are 0 and values NaN
    Candidate chosen = MakeCandidate(smallest);
    if constexpr (kElement == KvElement::kE4m3) {
      const Candidate better = BetterE4m3Scale(x, chosen, quarter, sums);
      if (finite) chosen = better;
    }
    if (quarter.lane == 0) {
      *reinterpret_cast<uint16_t*>(scale_out) = static_cast<uint16_t>(chosen.half);
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = Divide(x[i].x, chosen.scale, chosen.inverse);
      const float b = Divide(x[i].y, chosen.scale, chosen.inverse);
      uint32_t codes;
      float2 value;
      if constexpr (kElement == KvElement::kE4m3) {
        codes = E4m3Pair(a, b);
        value = E4m3Values(codes);
      } else {
        const int ia = Int8Code(a), ib = Int8Code(b);
        codes = (ia & 0xff) | (ib & 0xff) << 8;
        value = make_float2(static_cast<float>(ia), static_cast<float>(ib));
      }
      *reinterpret_cast<uint16_t*>(codes_out + 2 * (8 * i + quarter.lane)) =
          static_cast<uint16_t>(finite ? codes : 0);
      x[i] = make_float2(__fmul_rn(chosen.scale, value.x), __fmul_rn(chosen.scale, value.y));
    }
  }
}

}  // namespace winnow::kernels::internal
