#pragma once

#include <cstdint>

#include "kernels/cuda/gemv.h"
#include "kernels/cuda/ptx.cuh"

// What the GEMV kernels do with an output.
namespace winnow::kernels::internal {

// silu(gate) * up. The quotient is within two units in the last place, and 0 past a divisor of
// 2^126: a correctly rounded one is a long way for code that runs once.
__device__ __forceinline__ float GemvSilu(float gate, float up) {
  return __fdividef(gate, 1.0f + expf(-gate)) * up;
}

__device__ __forceinline__ void StoreGemv(const GemvParams& p, int64_t at, float y) {
  if (p.out_f32 != nullptr) {
    p.out_f32[at] = y;
  } else {
    p.out_bf16[at].bits = static_cast<uint16_t>(ptx::PackBf16(y, 0.0f));
  }
}

}  // namespace winnow::kernels::internal
