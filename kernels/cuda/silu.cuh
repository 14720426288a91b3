#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// silu(gate) * up with the bits of kernels/swiglu.h.
namespace winnow::kernels::device {

// 1 + exp(x) as vec_math-inl.h's Silu() has it, operation by operation. Below -87 its exp() is 0
// and this one's is not, but 1 is the sum of both; of a NaN this gives 1, as what it divides is
// NaN.
__device__ __forceinline__ float OnePlusExp(float x) {
  const float clamped = fminf(fmaxf(x, -87.0f), 88.72f);
  const float n = rintf(__fmul_rn(clamped, 1.44269504088896341f));
  float r = __fmaf_rn(-n, 0.693359375f, clamped);
  r = __fmaf_rn(-n, -2.12194440e-4f, r);
  float q = 1.9875691500e-4f;
  q = __fmaf_rn(q, r, 1.3981999507e-3f);
  q = __fmaf_rn(q, r, 8.3334519073e-3f);
  q = __fmaf_rn(q, r, 4.1665795894e-2f);
  q = __fmaf_rn(q, r, 1.6666665459e-1f);
  q = __fmaf_rn(q, r, 5.0000001201e-1f);
  const float y = __fadd_rn(__fmaf_rn(q, __fmul_rn(r, r), r), 1.0f);
  const float exp = __int_as_float(__float_as_int(y) + (__float2int_rn(n) << 23));
  return __fadd_rn(1.0f, x > 88.72f ? __int_as_float(0x7f800000) : exp);
}

__device__ __forceinline__ float SiluTimes(float gate, float up) {
  return __fmul_rn(__fdiv_rn(gate, OnePlusExp(-gate)), up);
}

}  // namespace winnow::kernels::device
