#pragma once

#include "absl/status/status.h"
#include "common/base/thread_pool.h"

namespace winnow::kernels {

// The separate projection that decides evictions (dms_proj_alpha), all in float:
//   out[m, g] = sum_h x[m, h] * weight[g, h] + bias[g]
// Law of order: products are summed in 16 interleaved sums (h % 16) and those in
// one fixed tree, so a row depends on itself alone.
struct DmsLogitsParams {
  const float* x = nullptr;       // [m, hidden]; after the projection's own norm
  const float* weight = nullptr;  // [num_kv_heads, hidden]
  const float* bias = nullptr;    // [num_kv_heads]; null: none
  float* out = nullptr;           // [m, num_kv_heads]; must not alias x
  int m = 0, hidden = 0, num_kv_heads = 0;
};

// INVALID_ARGUMENT for a null pointer or a bad shape.
absl::Status ValidateDmsLogits(const DmsLogitsParams& params);
absl::Status DmsLogitsCpu(const DmsLogitsParams& params, ThreadPool* pool);

}  // namespace winnow::kernels
