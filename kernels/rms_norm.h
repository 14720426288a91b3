#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/base/thread_pool.h"

namespace winnow::kernels {

// out[m, n] = x[m, n] / sqrt(mean_n(x[m, :]^2) + eps) * weight[n], in float; the
// BF16 output is rounded once, at the end.
//
// Law of order: squares are summed in 16 interleaved sums (n % 16) and those in
// one fixed tree, whatever the vector width.
struct RmsNormParams {
  const float* x = nullptr;       // [m, n], row stride ldx
  const float* weight = nullptr;  // [n]
  Bf16* out_bf16 = nullptr;       // [m, n] contiguous; may be null
  float* out_f32 = nullptr;       // [m, n] contiguous; may be null, may be x when ldx == n
  int m = 0, n = 0;               // m >= 0, n >= 1
  int64_t ldx = 0;                // elements, >= n
  float eps = 0.0f;
};

// INVALID_ARGUMENT for a null input, no output, or a bad shape.
absl::Status ValidateRmsNorm(const RmsNormParams& params);
absl::Status RmsNormCpu(const RmsNormParams& params, ThreadPool* pool);

}  // namespace winnow::kernels
