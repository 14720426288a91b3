#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"

namespace winnow::kernels {

// What DmsLogitsCpu does, to the same bits, from BF16 inputs: the separate projection that
// decides evictions, as LaunchDmsPrepare() takes it. Pointers are to device memory.
//   out[m, g] = sum_h x[m, h] * weight[g, h] + bias[g]
struct DmsLogitsCudaParams {
  const Bf16* x = nullptr;  // [m, hidden], row stride x_stride; after the projection's own norm
  int64_t x_stride = 0;     // elements
  const float* weight = nullptr;  // [num_kv_heads, hidden]
  const float* bias = nullptr;    // [num_kv_heads]; null: none
  float* out = nullptr;           // [m, num_kv_heads]
  int m = 0, hidden = 0, num_kv_heads = 0;
};

// INVALID_ARGUMENT for a null pointer or a bad shape.
absl::Status ValidateDmsLogitsCuda(const DmsLogitsCudaParams& params);
absl::Status LaunchDmsLogits(const DmsLogitsCudaParams& params, StreamHandle stream);

}  // namespace winnow::kernels
