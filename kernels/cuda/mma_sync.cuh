#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Warp-level matrix products and the conversions that feed them (sm_80 and up).
namespace winnow::kernels::device {

// d += a * b, [16, 16] by [16, 8], float16 in, float32 out. Fragments as in the PTX ISA,
// mma.m16n8k16.
__device__ __forceinline__ void MmaF16(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void MmaBf16(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows by 16 bytes: lane i has the shared address of row i % 8 of number i / 8,
// and gets of each, in order, bytes 4 (i % 4) to 4 (i % 4) + 3 of row i / 4.
__device__ __forceinline__ uint4 LoadMatrices(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// The lower / upper two e4m3 codes of `w` as two float16, exact. 0x7f, never stored, is NaN or 480.
template <int kHalf>
__device__ __forceinline__ uint32_t E4m3PairToF16(uint32_t w) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  // Halves of a register as PTX names them: a shift would stay one.
  uint32_t out;
  if constexpr (kHalf == 0) {
    asm("{\n.reg .b16 half, other;\nmov.b32 {half, other}, %1;\ncvt.rn.f16x2.e4m3x2 %0, half;\n}\n"
        : "=r"(out)
        : "r"(w));
  } else {
    asm("{\n.reg .b16 half, other;\nmov.b32 {other, half}, %1;\ncvt.rn.f16x2.e4m3x2 %0, half;\n}\n"
        : "=r"(out)
        : "r"(w));
  }
  return out;
#else
  // As a float16 the same sign, exponent and mantissa bits are worth 2^-8 of it.
  const uint32_t x = __byte_perm(w, 0, kHalf == 0 ? 0x1404 : 0x3424);
  const uint32_t bits = (x & 0x80008000u) | ((x >> 1) & 0x3f803f80u);
  __half2 value;
  memcpy(&value, &bits, 4);
  value = __hmul2(value, __floats2half2_rn(256.0f, 256.0f));
  uint32_t out;
  memcpy(&out, &value, 4);
  return out;
#endif
}

// The lower / upper two int8 codes of `w` as two float16, exact: 0x6400 | (code + 128)
// is 1152 + code.
template <int kHalf>
__device__ __forceinline__ uint32_t Int8PairToF16(uint32_t w) {
  const uint32_t bits = __byte_perm(w ^ 0x80808080u, 0x64646464u, kHalf == 0 ? 0x4140 : 0x4342);
  __half2 value;
  memcpy(&value, &bits, 4);
  value = __hsub2(value, __floats2half2_rn(1152.0f, 1152.0f));
  uint32_t out;
  memcpy(&out, &value, 4);
  return out;
}

// x as the sum of two 16-bit floats, two values at a time.
struct SplitPair {
  uint32_t hi, lo;
};
__device__ __forceinline__ SplitPair SplitF16(float x0, float x1) {
  const __half2 hi = __floats2half2_rn(x0, x1);
  const float2 back = __half22float2(hi);
  const __half2 lo = __floats2half2_rn(x0 - back.x, x1 - back.y);
  SplitPair out;
  memcpy(&out.hi, &hi, 4);
  memcpy(&out.lo, &lo, 4);
  return out;
}
__device__ __forceinline__ SplitPair SplitBf16(float x0, float x1) {
  const __nv_bfloat162 hi = __floats2bfloat162_rn(x0, x1);
  const float2 back = __bfloat1622float2(hi);
  const __nv_bfloat162 lo = __floats2bfloat162_rn(x0 - back.x, x1 - back.y);
  SplitPair out;
  memcpy(&out.hi, &hi, 4);
  memcpy(&out.lo, &lo, 4);
  return out;
}

// One value: the high part in the lower half, the low part in the upper.
__device__ __forceinline__ uint32_t SplitOneF16(float x) {
  const __half hi = __float2half_rn(x);
  const __half2 both = __halves2half2(hi, __float2half_rn(x - __half2float(hi)));
  uint32_t out;
  memcpy(&out, &both, 4);
  return out;
}
__device__ __forceinline__ uint32_t SplitOneBf16(float x) {
  const __nv_bfloat16 hi = __float2bfloat16_rn(x);
  const __nv_bfloat162 both = __halves2bfloat162(hi, __float2bfloat16_rn(x - __bfloat162float(hi)));
  uint32_t out;
  memcpy(&out, &both, 4);
  return out;
}

// 2^x; 0 for -infinity.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace winnow::kernels::device
