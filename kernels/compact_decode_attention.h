#pragma once

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/base/thread_pool.h"
#include "kernels/kv_span.h"
#include "kernels/thread_scratch.h"

namespace winnow::kernels {

// One query token a sequence over all live tokens of its spans, the token
// itself included (DecodePrepare comes first):
//   out[s,h,:] = sum_j softmax_j(scale * <q[s,h,:], k[j,g,:]>) * v[j,g,:],  g = h / (num_heads /
//   num_kv_heads)
// Law of order and bits: see DmsPrefillAttention. A sequence's output does not
// depend on its batch mates.
struct CompactDecodeAttentionParams {
  KvLayout layout;
  const Span* const* spans =
      nullptr;               // [num_seqs]: each sequence's spans of this layer, [num_kv_heads]
  const float* q = nullptr;  // [num_seqs, num_heads, head_dim]; after RoPE
  float* out_f32 = nullptr;  // [num_seqs, num_heads, head_dim]; exactly one of the two
  Bf16* out_bf16 = nullptr;  // the same, rounded to BF16
  int num_seqs = 0, num_heads = 0, num_kv_heads = 0;
  float scale = 0.0f;
  ThreadScratch* scratch = nullptr;  // blocks of AttentionScratchBytes(), dms_prefill_attention.h
};

// As ValidateDmsPrefillAttention; INVALID_ARGUMENT for an empty span.
absl::Status ValidateCompactDecodeAttention(const CompactDecodeAttentionParams& params);
// `pool` may be null. REQUIRES: scratch->num_threads() >= pool's.
absl::Status CompactDecodeAttentionCpu(const CompactDecodeAttentionParams& params,
                                       ThreadPool* pool);

}  // namespace winnow::kernels
