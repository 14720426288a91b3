#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"

// Rows to e4m3 with one scale each: activations before an FP8 product, and weights once, when
// they are loaded.
//
//   v[i, j] = x[i, j], or with silu_mul  silu(x[i, j]) * x[i, k + j] with swiglu.h's bits
//   scale[i] = max(max_j |v[i, j]|, 2^-100) / 448,  code[i, j] = e4m3(v[i, j] / scale[i])
//
// so |v - scale * code| <= max(2^-4 |v|, 2^-10 scale), and of a float rounding of the quotient
// 2^-23 of it more. A row with a NaN or an infinity gets the scale NaN and codes 0.
namespace winnow::kernels {

// All pointers are device pointers.
struct QuantizeRowsParams {
  const Bf16* x = nullptr;   // [m, k] or [m, 2 k] (gate, then up), row stride ldx; 16-byte aligned
  uint8_t* codes = nullptr;  // [m, k] contiguous; 8-byte aligned. Must not overlap x
  float* scale = nullptr;    // [m]
  int m = 0, k = 0;          // m >= 0; k >= 8 and a multiple of 8
  int64_t ldx = 0;           // elements, a multiple of 8
  bool silu_mul = false;
};

// INVALID_ARGUMENT for a null or misaligned pointer or a bad shape.
absl::Status ValidateQuantizeRows(const QuantizeRowsParams& params);
// Enqueues; never synchronizes or allocates.
absl::Status LaunchQuantizeRows(const QuantizeRowsParams& params, StreamHandle stream);

}  // namespace winnow::kernels
