#pragma once

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/decode_plan.h"
#include "kernels/cuda/device_spans.h"

namespace winnow::kernels {

// What CompactDecodeAttentionCpu computes, on spans in device memory, of one layer.
// K and V enter the products exactly (code * scale), queries and probabilities as sums
// of two 16-bit floats (in 8-bit formats what is below 2^-32 of the largest probability may count
// as nothing), sums are float32. Bits depend on a row's query and span alone.
struct CompactDecodeAttentionCudaParams {
  DeviceSpans spans;
  DecodePlan plan;  // of this step
  int layer = 0;
  const float* q = nullptr;  // [num_seqs, num_heads, head_dim]; after RoPE; 16-byte aligned
  float* out_f32 = nullptr;  // [num_seqs, num_heads, head_dim]; exactly one of the two
  Bf16* out_bf16 = nullptr;  // the same, rounded to BF16
  int num_seqs = 0, num_heads = 0;
  float scale = 0.0f;
  // The launch may begin while the kernel before it in the stream ends. Before it waits for
  // that one it reads the plan, page tables and stored tokens, but for the pages and the row
  // that the step's own token goes to. REQUIRES that what wrote them was complete before the
  // kernel before this one began.
  bool overlap_launch = false;
};

inline constexpr int kMaxDecodeGroup = 8;  // query heads a KV head

// INVALID_ARGUMENT for a null pointer or a bad shape; UNIMPLEMENTED for a head_dim other
// than 64 and 128, or more than kMaxDecodeGroup query heads a KV head.
absl::Status ValidateCompactDecodeAttention(const CompactDecodeAttentionCudaParams& params);
// Rows without a sequence are not written.
absl::Status LaunchCompactDecodeAttention(const CompactDecodeAttentionCudaParams& params,
                                          StreamHandle stream);

}  // namespace winnow::kernels
