#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/store_vector.cuh"

// One K or V quantized as kv_format's StoreRow() does, to the same bits, by four lanes, where x
// comes as BF16. Lane l of the four holds dims 16 i + 4 l + {0..3}, so that the error's sixteen
// partial sums are the CPU's.
namespace winnow::kernels::internal {

struct Four {
  int lane;       // in the four
  uint32_t mask;  // of the four in the warp
};

inline __device__ uint32_t MaxOfFour(uint32_t x, const Four& four) {
  x = max(x, __shfl_xor_sync(four.mask, x, 1));
  return max(x, __shfl_xor_sync(four.mask, x, 2));
}

// kv_format's E4m3ScaleFor(): `smallest` or sqrt(2) times it. `sums` [2][16] is the four
// lanes' own.
template <int kN>
__device__ Scale BetterE4m3Scale(const float4 (&x)[kN], const Scale& smallest, const Four& four,
                                 float* sums) {
  Scale other;
  other.half = min(RoundToHalf(__fmul_rn(FromHalf(smallest.half), 1.41421356237309504880f)),
                   uint16_t{0x7bff});
  other.inverse = __frcp_rn(FromHalf(other.half));
  const auto square = [](float y, float rounded) {  // the same for -y and -rounded
    const float error = __fsub_rn(y, rounded);
    return __fmul_rn(error, error);
  };
#pragma unroll
  for (int candidate = 0; candidate < 2; ++candidate) {
    const float inverse = candidate == 0 ? smallest.inverse : other.inverse;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float a = __fmul_rn(x[i].x, inverse), b = __fmul_rn(x[i].y, inverse);
      const float c = __fmul_rn(x[i].z, inverse), d = __fmul_rn(x[i].w, inverse);
      const float2 ab = RoundedToE4m3(a, b), cd = RoundedToE4m3(c, d);
      sum.x = __fadd_rn(sum.x, square(a, ab.x));
      sum.y = __fadd_rn(sum.y, square(b, ab.y));
      sum.z = __fadd_rn(sum.z, square(c, cd.x));
      sum.w = __fadd_rn(sum.w, square(d, cd.y));
    }
    *reinterpret_cast<float4*>(sums + 16 * candidate + 4 * four.lane) = sum;
  }
  __syncwarp(four.mask);
  // Even lanes add up the first candidate's sums in order, odd ones the second's.
  const int mine = four.lane & 1;
  const float4* parts = reinterpret_cast<const float4*>(sums + 16 * mine);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 part = parts[i];
    total = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(total, part.x), part.y), part.z), part.w);
  }
  const float scale = FromHalf(mine == 0 ? smallest.half : other.half);
  total = __fmul_rn(__fmul_rn(total, scale), scale);
  const float others = __shfl_xor_sync(four.mask, total, 1);
  return (mine == 0 ? others < total : total < others) ? other : smallest;
}

// x / s, rounded so that a code's rounding cannot tell it from the quotient. x has 8 bits,
// s 11 and a tie between codes at most 8 (of int8), so a quotient is a tie exactly or off
// every tie by 2^-19. The product is off the quotient by less than 2^-23, at a tie by one
// unit in its last place, or two below if the tie is a power of two; a multiple of four
// units next to it is the tie, and moves no other quotient across one.
inline __device__ float Divide(float x, float inverse) {
  return __int_as_float((__float_as_int(__fmul_rn(x, inverse)) + 2) & ~3);
}

// Quantizes the four lanes' vector, whose largest magnitude has the bits `amax`: its codes
// and scale go to the staged row, and x becomes what they stand for.
template <KvElement kElement, int kN>
__device__ void StoreVector(float4 (&x)[kN], uint32_t amax, const Four& four, float* sums,
                            uint8_t* codes_out, uint8_t* scale_out) {
  if constexpr (kElement == KvElement::kBf16) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      auto* to = reinterpret_cast<uint32_t*>(codes_out + 32 * i + 8 * four.lane);
      to[0] = ptx::PackBf16(x[i].x, x[i].y);
      to[1] = ptx::PackBf16(x[i].z, x[i].w);
    }
  } else {
    constexpr float kMaxCode = KvElementTraits<kElement>::kMaxCode;
    Scale scale{.half = ScaleFor(amax, kMaxCode, [](float x) { return __fdiv_rn(x, kMaxCode); })};
    scale.inverse = __frcp_rn(FromHalf(scale.half));
    const uint32_t finite = scale.half != 0x7e00 ? ~0u : 0u;  // or codes are 0, values NaN
    if constexpr (kElement == KvElement::kE4m3) {
      const Scale better = BetterE4m3Scale(x, scale, four, sums);
      if (finite != 0) scale = better;
    }
    const float factor = FromHalf(scale.half), inverse = scale.inverse;
    if (four.lane == 0) *reinterpret_cast<uint16_t*>(scale_out) = scale.half;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float q[4] = {Divide(x[i].x, inverse), Divide(x[i].y, inverse), Divide(x[i].z, inverse),
                          Divide(x[i].w, inverse)};
      uint32_t codes;
      float value[4];
      if constexpr (kElement == KvElement::kE4m3) {
        const uint32_t lo =
            __nv_cvt_float2_to_fp8x2(make_float2(q[0], q[1]), __NV_SATFINITE, __NV_E4M3);
        const uint32_t hi =
            __nv_cvt_float2_to_fp8x2(make_float2(q[2], q[3]), __NV_SATFINITE, __NV_E4M3);
        codes = lo | hi << 16;
        const auto values = [](uint32_t pair) {
          return __half22float2(__half2(
              __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3)));
        };
        const float2 a = values(lo), b = values(hi);
        value[0] = a.x;
        value[1] = a.y;
        value[2] = b.x;
        value[3] = b.y;
      } else {
        codes = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int code = __float2int_rn(fminf(fmaxf(q[n], -127.0f), 127.0f));
          codes |= (static_cast<uint32_t>(code) & 0xff) << (8 * n);
          value[n] = static_cast<float>(code);
        }
      }
      *reinterpret_cast<uint32_t*>(codes_out + 16 * i + 4 * four.lane) = codes & finite;
      x[i] = make_float4(__fmul_rn(factor, value[0]), __fmul_rn(factor, value[1]),
                         __fmul_rn(factor, value[2]), __fmul_rn(factor, value[3]));
    }
  }
}

}  // namespace winnow::kernels::internal
