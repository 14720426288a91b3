#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/base/thread_pool.h"
#include "kernels/kv_span.h"
#include "kernels/thread_scratch.h"

namespace winnow::kernels {

// Attention of a chunk of one sequence's tokens over its cached prefix and
// itself:
//   out[i,h,:] = sum_j softmax_j(scale * <q[i,h,:], k[j,g,:]>) * v[j,g,:],  g = h / (num_heads /
//   num_kv_heads) visible(i, j) = j <= i and (i - j <= window or kept(j))
// where i is absolute: the first chunk token's position is spans[g].num_tokens.
// kept(j) follows from the chunk's decisions and layout.shift; the last token's
// unknown bit counts as keep. K and V are read as stored, also the chunk's own.
// Evicted keys outside the window of all rows of a query tile are not computed.
//
// Law of order: dot over head_dim upwards, the true maximum first, then
// denominator and P*V over the visible keys in ascending position, one
// division. A row's bits do not depend on chunk borders or threads, and equal
// CompactDecodeAttention's for the same position.
struct DmsPrefillAttentionParams {
  KvLayout layout;
  const Span* spans = nullptr;    // [num_kv_heads]: the prefix, before the chunk is appended
  const float* q = nullptr;       // [num_tokens, num_heads, head_dim]; after RoPE
  const uint8_t* rows = nullptr;  // [num_tokens, num_kv_heads, TokenBytes]: the chunk's flat rows
  const uint8_t* decisions = nullptr;  // [num_tokens, num_kv_heads]; null: all keep
  float* out_f32 = nullptr;            // [num_tokens, num_heads, head_dim]; exactly one of the two
  Bf16* out_bf16 = nullptr;            // the same, rounded to BF16
  int num_tokens = 0, num_heads = 0, num_kv_heads = 0;
  float scale = 0.0f;                // 1 / sqrt(head_dim) for most models
  ThreadScratch* scratch = nullptr;  // blocks of AttentionScratchBytes() for the longest row here
};

// Bytes a thread needs when no query sees more than `max_keys` keys (live
// tokens of a span plus a chunk). Serves both attention ops.
size_t AttentionScratchBytes(int num_heads, int num_kv_heads, int head_dim, int max_keys);

// INVALID_ARGUMENT for a null pointer, bad shape or too small a scratch;
// UNIMPLEMENTED for a head_dim that ValidateHeadDim() refuses.
absl::Status ValidateDmsPrefillAttention(const DmsPrefillAttentionParams& params);
// `pool` may be null. REQUIRES: scratch->num_threads() >= pool's.
absl::Status DmsPrefillAttentionCpu(const DmsPrefillAttentionParams& params, ThreadPool* pool);

}  // namespace winnow::kernels
