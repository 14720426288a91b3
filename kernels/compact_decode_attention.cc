#include "kernels/compact_decode_attention.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/attention_core.h"
#include "kernels/dms_prefill_attention.h"
#include "kernels/parallel.h"

namespace winnow::kernels {

absl::Status ValidateCompactDecodeAttention(const CompactDecodeAttentionParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateHeadDim(p.layout.head_dim));
  if (p.num_seqs < 0 || p.num_heads < 1 || p.num_kv_heads < 1 ||
      p.num_heads % p.num_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("compact_decode_attention: num_seqs=", p.num_seqs, " num_heads=", p.num_heads,
                     " num_kv_heads=", p.num_kv_heads));
  }
  if (p.spans == nullptr || p.q == nullptr || p.scratch == nullptr) {
    return absl::InvalidArgumentError("compact_decode_attention: spans, q or scratch is null");
  }
  if ((p.out_f32 == nullptr) == (p.out_bf16 == nullptr)) {
    return absl::InvalidArgumentError(
        "compact_decode_attention: not exactly one of out_f32 and out_bf16 is set");
  }
  int max_live = 0;
  for (int s = 0; s < p.num_seqs; ++s) {
    for (int g = 0; g < p.num_kv_heads; ++g) {
      if (p.spans[s][g].num_tokens == 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("compact_decode_attention: sequence ", s, " is empty"));
      }
      max_live = std::max(max_live, p.spans[s][g].num_live());
    }
  }
  const size_t needed =
      AttentionScratchBytes(p.num_heads, p.num_kv_heads, p.layout.head_dim, max_live);
  if (p.scratch->bytes_each() < needed) {
    return absl::InvalidArgumentError(absl::StrCat("compact_decode_attention: scratch of ",
                                                   p.scratch->bytes_each(), " bytes a thread, ",
                                                   needed, " needed"));
  }
  return absl::OkStatus();
}

absl::Status CompactDecodeAttentionCpu(const CompactDecodeAttentionParams& p, ThreadPool* pool) {
  WINNOW_RETURN_IF_ERROR(ValidateCompactDecodeAttention(p));
  const int head_dim = p.layout.head_dim;
  const int group = p.num_heads / p.num_kv_heads;
  ParallelRange(pool, p.num_seqs * p.num_kv_heads, 1, [&](int begin, int end) {
    ThreadScratch::Lease lease(p.scratch);
    for (int item = begin; item < end; ++item) {
      const int s = item / p.num_kv_heads;
      const int g = item % p.num_kv_heads;
      const Span* span = &p.spans[s][g];
      const int64_t offset =
          (static_cast<int64_t>(s) * p.num_heads + static_cast<int64_t>(g) * group) * head_dim;
      internal::RunAttentionTile({.source = {.layout = p.layout, .span = span},
                                  .q = p.q + offset,
                                  .query_stride = 0,
                                  .out_f32 = p.out_f32 == nullptr ? nullptr : p.out_f32 + offset,
                                  .out_bf16 = p.out_bf16 == nullptr ? nullptr : p.out_bf16 + offset,
                                  .first_query = span->num_tokens - 1,
                                  .num_queries = 1,
                                  .group = group,
                                  .scale = p.scale,
                                  .scratch = lease.data()});
    }
  });
  return absl::OkStatus();
}

}  // namespace winnow::kernels
