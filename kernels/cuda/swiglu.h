#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"

namespace winnow::kernels {

// SwiGluCpu(): out[m, i] = silu(x[m, i]) * x[m, intermediate + i]. The bits are those of the
// CPU's paths that have a fused multiply-add (avx2 and up), but for the payload of a NaN.
struct SwiGluCudaParams {
  // Exactly one is set: device [m, 2 * intermediate], gate then up, row stride ldx.
  const float* x_f32 = nullptr;
  const Bf16* x_bf16 = nullptr;
  Bf16* out_bf16 = nullptr;     // device [m, intermediate] contiguous; may be null
  float* out_f32 = nullptr;     // device [m, intermediate] contiguous; may be null
  int m = 0, intermediate = 0;  // m >= 0, intermediate >= 1
  int64_t ldx = 0;              // elements, >= 2 * intermediate
};

// INVALID_ARGUMENT for not one input, no output, or a bad shape.
absl::Status ValidateSwiGluCuda(const SwiGluCudaParams& params);
absl::Status LaunchSwiGlu(const SwiGluCudaParams& params, StreamHandle stream);

}  // namespace winnow::kernels
