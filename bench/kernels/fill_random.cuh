#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Random data made on the device; a program includes this once.
namespace winnow {

// 32 random bits of a counter.
__device__ uint32_t Mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(x >> 32);
}

// Standard normal BF16, a pair a turn. Any grid.
__global__ void FillNormal(__nv_bfloat162* x, int64_t pairs, uint32_t seed) {
  const auto hash = [](uint64_t n) {
    n = (n ^ (n >> 31)) * 0x9e3779b97f4a7c15ull;
    n = (n ^ (n >> 29)) * 0xbf58476d1ce4e5b9ull;
    return static_cast<uint32_t>(n >> 32);
  };
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < pairs;
       i += gridDim.x * int64_t{blockDim.x}) {
    const uint64_t n = static_cast<uint64_t>(i) * 2 + (uint64_t{seed} << 40) + 1;
    const float u = (static_cast<float>(hash(n)) + 1.0f) * 0x1p-32f;
    const float angle = static_cast<float>(hash(n + 1)) * 0x1p-31f;
    const float radius = sqrtf(-2.0f * logf(fminf(u, 1.0f)));
    x[i] = __floats2bfloat162_rn(radius * cospif(angle), radius * sinpif(angle));
  }
}

}  // namespace winnow
