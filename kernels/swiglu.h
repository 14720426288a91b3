#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/base/thread_pool.h"

namespace winnow::kernels {

// out[m, i] = silu(x[m, i]) * x[m, intermediate + i], silu(g) = g / (1 + exp(-g)),
// in float; the BF16 output is rounded once, at the end.
struct SwiGluParams {
  const float* x = nullptr;     // [m, 2 * intermediate], gate then up, row stride ldx
  Bf16* out_bf16 = nullptr;     // [m, intermediate] contiguous; may be null
  float* out_f32 = nullptr;     // [m, intermediate] contiguous; may be null; must not alias x
  int m = 0, intermediate = 0;  // m >= 0, intermediate >= 1
  int64_t ldx = 0;              // elements, >= 2 * intermediate
};

// INVALID_ARGUMENT for a null input, no output, or a bad shape.
absl::Status ValidateSwiGlu(const SwiGluParams& params);
absl::Status SwiGluCpu(const SwiGluParams& params, ThreadPool* pool);

}  // namespace winnow::kernels
