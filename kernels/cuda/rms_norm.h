#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"

namespace winnow::kernels {

inline constexpr int kMaxRmsNormCuda = 32768;  // most columns

// RmsNormCpu(), with a residual that is added first:
//   y = x + add (one addition, as a GEMM of the CPU that accumulates), residual = y,
//   out = y / sqrt(mean(y^2) + eps) * weight
// Squares are summed in the CPU's order, so the bits are those of its paths that have a fused
// multiply-add (avx2 and up); a NaN is a NaN there too, but not of the same payload.
struct RmsNormCudaParams {
  const float* x = nullptr;        // device [m, n], row stride ldx
  const float* add_f32 = nullptr;  // device [m, n] contiguous; at most one of the two is set
  const Bf16* add_bf16 = nullptr;
  float* residual = nullptr;      // device [m, n], row stride ldx; may be null, may be x
  const float* weight = nullptr;  // device [n]
  Bf16* out_bf16 = nullptr;       // device [m, n] contiguous; may be null
  float* out_f32 = nullptr;       // device [m, n] contiguous; may be null
  int m = 0, n = 0;               // m >= 0, n in [1, kMaxRmsNormCuda]
  int64_t ldx = 0;                // elements, >= n
  float eps = 0.0f;
};

// INVALID_ARGUMENT for a null input, no output, two summands or a bad shape.
absl::Status ValidateRmsNormCuda(const RmsNormCudaParams& params);
// UNIMPLEMENTED if `limit` bytes of shared memory a block do not hold a row of n columns: sm_80's
// hold them all, sm_89's 25,340.
absl::Status CheckRmsNormSharedBytes(int n, int64_t limit);
// As both say, with the limit of the current device.
absl::Status LaunchRmsNorm(const RmsNormCudaParams& params, StreamHandle stream);

}  // namespace winnow::kernels
