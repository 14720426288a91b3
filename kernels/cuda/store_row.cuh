#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/kv_format.h"

// kv_format.h's StoreRow() of one K or V by one warp, to the same bits: every operation is
// rounded where the CPU's is, so none is fused.
namespace winnow::kernels::device {

// Channel lane + 32 * i of a head is x[i] of the lane.
template <int kDim>
using HeadLanes = float[kDim / 32];

inline constexpr uint16_t kHalfNan = 0x7e00;
inline constexpr uint16_t kHalfMax = 0x7bff;

__device__ __forceinline__ uint16_t HalfBits(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ float HalfValue(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

// |x| to e4m3 and back, as a float; finite x.
__device__ __forceinline__ float RoundToE4m3(float x) {
  const int abs = min(__float_as_int(x) & 0x7fffffff, __float_as_int(448.0f));
  const int normal = (abs + 0x7ffff + ((abs >> 20) & 1)) & ~0xfffff;
  const float small = __fadd_rn(__fadd_rn(__int_as_float(abs), 16384.0f), -16384.0f);
  return abs < 0x3c800000 ? small : __int_as_float(normal);
}

__device__ __forceinline__ uint8_t EncodeE4m3(float x) {
  const int u = __float_as_int(x);
  const int sign = (u >> 24) & 0x80;
  const int abs = min(u & 0x7fffffff, __float_as_int(448.0f));
  const int normal = ((abs + 0x7ffff + ((abs >> 20) & 1)) >> 20) - (120 << 3);
  const int small = __float_as_int(__fadd_rn(__int_as_float(abs), 16384.0f)) & 0xff;
  return static_cast<uint8_t>(sign | (abs < 0x3c800000 ? small : normal));
}

__device__ __forceinline__ uint8_t EncodeInt8(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  const float y = __fadd_rn(fminf(fmaxf(x, -127.0f), 127.0f), kShift);
  return static_cast<uint8_t>(__float_as_int(y) - __float_as_int(kShift));
}

// Squared error of e4m3 codes with scale `half`: sixteen sums, lane j's of channels j + 16 i
// in order, then those in order.
template <int kDim>
__device__ __forceinline__ float E4m3Error(const HeadLanes<kDim>& x, uint16_t half, int lane) {
  const float scale = HalfValue(half), inverse = __fdiv_rn(1.0f, scale);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const float y = __fmul_rn(x[i], inverse);
    const float error = __fsub_rn(fabsf(y), RoundToE4m3(y));
    const float square = __fmul_rn(error, error);
    const float upper = __shfl_down_sync(0xffffffffu, square, 16);  // of channel + 16
    sum = __fadd_rn(__fadd_rn(sum, square), upper);
  }
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < 16; ++j) total = __fadd_rn(total, __shfl_sync(0xffffffffu, sum, j));
  return __fmul_rn(__fmul_rn(total, scale), scale);
}

// Writes a head's elements and scale; the warp's lanes all get here. The code of channel d
// goes to elements[d].
template <KvElement kE, int kDim>
__device__ __forceinline__ void StoreElements(const HeadLanes<kDim>& x, int lane, uint8_t* elements,
                                              uint8_t* scale_out) {
  if constexpr (kE == KvElement::kBf16) {
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      // As ToBf16(): a NaN keeps its upper bits.
      const uint32_t u = __float_as_uint(x[i]);
      const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
      const uint32_t bits = (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x0040u : rounded;
      reinterpret_cast<uint16_t*>(elements)[lane + 32 * i] = static_cast<uint16_t>(bits);
    }
  } else {
    constexpr float kMaxCode = KvElementTraits<kE>::kMaxCode;
    int amax_bits = 0;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      amax_bits = max(amax_bits, __float_as_int(x[i]) & 0x7fffffff);
    }
    amax_bits = __reduce_max_sync(0xffffffffu, amax_bits);
    uint16_t scale = kHalfNan;
    if (amax_bits < 0x7f800000) {
      const float amax = __int_as_float(amax_bits);
      scale = min(HalfBits(__fdiv_rn(amax, kMaxCode)), kHalfMax);
      if (scale == 0 || (scale < kHalfMax && __fmul_rn(HalfValue(scale), kMaxCode) < amax)) {
        ++scale;
      }
      if constexpr (kE == KvElement::kE4m3) {
        const uint16_t other =
            min(HalfBits(__fmul_rn(HalfValue(scale), 1.41421356237309504880f)), kHalfMax);
        if (E4m3Error<kDim>(x, other, lane) < E4m3Error<kDim>(x, scale, lane)) scale = other;
      }
    }
    const float s = HalfValue(scale);
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const float y = __fdiv_rn(x[i], s);
      uint8_t code = kE == KvElement::kInt8 ? EncodeInt8(y) : EncodeE4m3(y);
      if (scale == kHalfNan) code = 0;
      elements[lane + 32 * i] = code;
    }
    if (lane == 0) *reinterpret_cast<uint16_t*>(scale_out) = scale;
  }
}

}  // namespace winnow::kernels::device
