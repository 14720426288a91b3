#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/store_vector.cuh"

// One K or V quantized as kv_format's StoreRow() does, to the same bits, by four lanes, where x
// comes as BF16. Lane l of the four holds dims 32 i + 8 l + {0..7}, two a word.
namespace winnow::kernels::internal {

__device__ __forceinline__ float4 Unpack(uint32_t a, uint32_t b) {
  return make_float4(__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u),
                     __uint_as_float(b << 16), __uint_as_float(b & 0xffff0000u));
}

__device__ __forceinline__ float4 Times(float4 x, float factor) {
  return make_float4(__fmul_rn(x.x, factor), __fmul_rn(x.y, factor), __fmul_rn(x.z, factor),
                     __fmul_rn(x.w, factor));
}

// x / s, rounded so that a code's rounding cannot tell it from the quotient. x has 8 bits,
// s 11 and a tie between codes at most 8 (of int8), so a quotient is a tie exactly or off
// every tie by 2^-19. The product is off the quotient by less than 2^-23, at a tie by one
// unit in its last place, or two below if the tie is a power of two; a multiple of four
// units next to it is the tie, and moves no other quotient across one.
__device__ __forceinline__ float Divide(float x, float inverse) {
  return __int_as_float((__float_as_int(__fmul_rn(x, inverse)) + 2) & ~3);
}
__device__ __forceinline__ float4 Divide(float4 x, float inverse) {
  return make_float4(Divide(x.x, inverse), Divide(x.y, inverse), Divide(x.z, inverse),
                     Divide(x.w, inverse));
}

// Whether some x / s may lie halfway between two e4m3 codes, where the product's code need not
// be the quotient's. Such an x is s times an odd number of units, and has 8 bits: from 2^-6 up
// the number has 5 bits, so s has at most 4; below, it has at most 4, so s at most 8.
// `least` is the least |x|, `s` a float16's bits.
__device__ __forceinline__ bool MayTie(uint32_t s, float least) {
  const bool subnormal = s < 0x400, four_bits = (s & 0x7f) == 0, eight_bits = (s & 7) == 0;
  const bool small = least < __fmul_rn(FromHalf(static_cast<uint16_t>(s)), 0x1p-6f);
  return subnormal | four_bits | (eight_bits & small);
}

// kv_format's E4m3Error() of the four lanes' vector: sixteen sums, of the dims that are alike
// modulo 16, then those in order. Lanes l and l ^ 2 have the same eight sums.
template <uint32_t kMask, int kFours>
__device__ __forceinline__ float ExactE4m3Error(const float4 (&x)[kFours],
                                                const Candidate& candidate, uint32_t lane) {
  float sums[8] = {}, inverse = candidate.inverse;
  asm volatile("" : "+f"(inverse));  // else what was made with it before is kept in registers
  const auto add = [&](float& sum, float y, float rounded) {  // the same for -y and -rounded
    const float error = __fsub_rn(y, rounded), own = __fmul_rn(error, error);
    const float others = __shfl_xor_sync(kMask, own, 2);
    const bool mine_first = (lane & 2) == 0;
    sum = __fadd_rn(__fadd_rn(sum, mine_first ? own : others), mine_first ? others : own);
  };
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const float4 y = Times(x[i], inverse);
    const float2 a = E4m3Values(E4m3Pair(y.x, y.y)), b = E4m3Values(E4m3Pair(y.z, y.w));
    float* to = sums + 4 * (i % 2);
    add(to[0], y.x, a.x);
    add(to[1], y.y, a.y);
    add(to[2], y.z, b.x);
    add(to[3], y.w, b.y);
  }
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float others = __shfl_xor_sync(kMask, sums[i % 8], 1);
    total = __fadd_rn(total, (lane & 1) == static_cast<uint32_t>(i / 8) ? sums[i % 8] : others);
  }
  return __fmul_rn(__fmul_rn(total, candidate.scale), candidate.scale);
}

// kv_format's E4m3ScaleFor(), which takes `smallest` or sqrt(2) times it, and the codes with
// it: returns what it takes. `least` is the least |x|.
template <uint32_t kMask, int kFours>
__device__ __forceinline__ Candidate E4m3Codes(const float4 (&x)[kFours], uint32_t smallest,
                                               float least, uint32_t lane,
                                               uint32_t (&codes)[kFours]) {
  const Candidate low = MakeCandidate(smallest);
  const Candidate high = OtherE4m3Candidate(low);
  const auto pick = [&](bool take_high) {
    return Candidate{.half = take_high ? high.half : low.half,
                     .scale = take_high ? high.scale : low.scale,
                     .inverse = take_high ? high.inverse : low.inverse};
  };
  const auto error_of = [&](const Candidate& candidate) {
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const float4 y = Times(x[i], candidate.inverse);
      const float2 a = E4m3Values(E4m3Pair(y.x, y.y)), b = E4m3Values(E4m3Pair(y.z, y.w));
      const float e[4] = {y.x - a.x, y.y - a.y, y.z - b.x, y.w - b.y};
      sums[0] = fmaf(e[1], e[1], fmaf(e[0], e[0], sums[0]));
      sums[1] = fmaf(e[3], e[3], fmaf(e[2], e[2], sums[1]));
    }
    return sums[0] + sums[1];
  };
  const float errors[2] = {error_of(low), error_of(high)};
  // Even lanes add up the first candidate's errors, odd ones the second's.
  const bool odd = (lane & 1) != 0;
  float own = odd ? errors[1] : errors[0];
  own += __shfl_xor_sync(kMask, odd ? errors[0] : errors[1], 1);
  own += __shfl_xor_sync(kMask, own, 2);
  const float scale = odd ? high.scale : low.scale;
  own = own * scale * scale;
  const float others = __shfl_xor_sync(kMask, own, 1);
  const float first = odd ? others : own, second = odd ? own : others;
  bool take_high = second < first;
  // These sums and the CPU's are within 2^-17 of the exact ones (less than 64 roundings each),
  // give or take a few numbers below the normal ones. Closer ones are told apart by the CPU's;
  // so is what is not a number.
  const bool close = !(fabsf(second - first) > fmaf(first + second, 0x1p-15f, 0x1p-80f));
  const bool finite = smallest != 0x7e00;  // or codes are 0
  const bool redo = close | !finite | MayTie(take_high ? high.half : low.half, least);
  if (!__any_sync(kMask, redo)) {
    const Candidate chosen = pick(take_high);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const float4 y = Times(x[i], chosen.inverse);
      codes[i] = E4m3Pair(y.x, y.y) | E4m3Pair(y.z, y.w) << 16;
    }
    return chosen;
  }
  if (__any_sync(kMask, close)) {
    const float exact_first = ExactE4m3Error<kMask>(x, low, lane);
    take_high = ExactE4m3Error<kMask>(x, high, lane) < exact_first;
  }
  const Candidate chosen = pick(take_high && finite);
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const float4 q = Divide(x[i], chosen.inverse);
    codes[i] = finite ? E4m3Pair(q.x, q.y) | E4m3Pair(q.z, q.w) << 16 : 0;
  }
  return chosen;
}

// Quantizes the vectors of the lanes of kMask, a four each: codes and scale go to the staged
// row, and x becomes what they stand for, rounded to BF16.
template <KvElement kElement, uint32_t kMask, int kWords>
__device__ __forceinline__ void StoreVector(uint32_t (&x)[kWords], uint32_t lane,
                                            uint8_t* codes_out, uint8_t* scale_out) {
  if constexpr (kElement == KvElement::kBf16) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      *reinterpret_cast<uint4*>(codes_out + 16 * i + 16 * lane) =
          make_uint4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    }
  } else {
    constexpr int kFours = kWords / 2;
    constexpr float kMaxCode = KvElementTraits<kElement>::kMaxCode;
    // Of the upper and of the lower halves.
    uint32_t most = 0, least = 0x7fff7fff;
    float4 v[kFours];
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const uint32_t a = x[2 * i] & 0x7fff7fff, b = x[2 * i + 1] & 0x7fff7fff;
      most = __vmaxu2(most, __vmaxu2(a, b));
      least = __vminu2(least, __vminu2(a, b));
      v[i] = Unpack(x[2 * i], x[2 * i + 1]);
    }
    most = max(most & 0xffff0000u, most << 16);
    most = max(most, __shfl_xor_sync(kMask, most, 1));
    most = max(most, __shfl_xor_sync(kMask, most, 2));
    const uint32_t smallest = ScaleFor(
        most, kMaxCode, [](float amax) { return Divide(amax, kMaxCode, 1.0f / kMaxCode); });
    uint32_t codes[kFours];
    Candidate scale;
    if constexpr (kElement == KvElement::kE4m3) {
      least = min(least & 0xffff0000u, least << 16);
      scale = E4m3Codes<kMask>(v, smallest, __uint_as_float(least), lane, codes);
    } else {
      scale = MakeCandidate(smallest);
    }
    if (lane == 0) *reinterpret_cast<uint16_t*>(scale_out) = static_cast<uint16_t>(scale.half);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      float4 values;
      if constexpr (kElement == KvElement::kE4m3) {
        const float2 a = E4m3Values(codes[i] & 0xffff), b = E4m3Values(codes[i] >> 16);
        values = make_float4(a.x, a.y, b.x, b.y);
      } else {
        const float4 y = Divide(v[i], scale.inverse);
        const int q[4] = {Int8Code(y.x), Int8Code(y.y), Int8Code(y.z), Int8Code(y.w)};
        codes[i] = (q[0] & 0xff) | (q[1] & 0xff) << 8 | (q[2] & 0xff) << 16 | q[3] << 24;
        if (scale.half == 0x7e00) codes[i] = 0;
        values = make_float4(static_cast<float>(q[0]), static_cast<float>(q[1]),
                             static_cast<float>(q[2]), static_cast<float>(q[3]));
      }
      *reinterpret_cast<uint32_t*>(codes_out + 32 * (i / 2) + 8 * lane + 4 * (i % 2)) = codes[i];
      values = Times(values, scale.scale);
      x[2 * i] = ptx::PackBf16(values.x, values.y);
      x[2 * i + 1] = ptx::PackBf16(values.z, values.w);
    }
  }
}

}  // namespace winnow::kernels::internal
