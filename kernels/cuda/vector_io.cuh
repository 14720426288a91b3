#pragma once

#include <cstdint>

#include "common/base/bf16.h"
#include "kernels/cuda/ptx.cuh"

// Activations of the token path in registers: kWidth (1, 4 or 8) floats, loaded from and stored as
// float or BF16 (as ToBf16(), but for the payload of a NaN). A width above 1 wants addresses that
// are multiples of its bytes, or of 16.
namespace winnow::kernels::device {

template <int kWidth>
struct Floats {
  float v[kWidth];
};

template <int kWidth>
__device__ __forceinline__ Floats<kWidth> Load(const float* p) {
  Floats<kWidth> x;
  if constexpr (kWidth > 1) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 f = *reinterpret_cast<const float4*>(p + i);
      x.v[i] = f.x, x.v[i + 1] = f.y, x.v[i + 2] = f.z, x.v[i + 3] = f.w;
    }
  } else {
    x.v[0] = *p;
  }
  return x;
}

template <int kWidth>
__device__ __forceinline__ Floats<kWidth> Load(const Bf16* p) {
  Floats<kWidth> x;
  if constexpr (kWidth > 1) {
    uint32_t pairs[kWidth / 2];
    if constexpr (kWidth == 8) {
      const uint4 u = *reinterpret_cast<const uint4*>(p);
      pairs[0] = u.x, pairs[1] = u.y, pairs[2] = u.z, pairs[3] = u.w;
    } else {
      const uint2 u = *reinterpret_cast<const uint2*>(p);
      pairs[0] = u.x, pairs[1] = u.y;
    }
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      x.v[2 * i] = __uint_as_float(pairs[i] << 16);
      x.v[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
    x.v[0] = __uint_as_float(uint32_t{p->bits} << 16);
  }
  return x;
}

template <int kWidth>
__device__ __forceinline__ void Store(const Floats<kWidth>& x, float* p) {
  if constexpr (kWidth > 1) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      *reinterpret_cast<float4*>(p + i) = make_float4(x.v[i], x.v[i + 1], x.v[i + 2], x.v[i + 3]);
    }
  } else {
    *p = x.v[0];
  }
}

template <int kWidth>
__device__ __forceinline__ void Store(const Floats<kWidth>& x, Bf16* p) {
  if constexpr (kWidth > 1) {
    uint32_t pairs[kWidth / 2];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      pairs[i] = ptx::PackBf16(x.v[2 * i], x.v[2 * i + 1]);
    }
    if constexpr (kWidth == 8) {
      *reinterpret_cast<uint4*>(p) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
      *reinterpret_cast<uint2*>(p) = make_uint2(pairs[0], pairs[1]);
    }
  } else {
    p->bits = static_cast<uint16_t>(ptx::PackBf16(x.v[0], 0.0f));
  }
}

}  // namespace winnow::kernels::device
