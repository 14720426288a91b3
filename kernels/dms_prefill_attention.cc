#include "kernels/dms_prefill_attention.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/attention_core.h"
#include "kernels/parallel.h"

namespace winnow::kernels {
namespace {

int MaxKeys(const DmsPrefillAttentionParams& p) {
  int max_live = 0;
  for (int g = 0; g < p.num_kv_heads; ++g) max_live = std::max(max_live, p.spans[g].num_live());
  return max_live + p.num_tokens;
}

}  // namespace

size_t AttentionScratchBytes(int num_heads, int num_kv_heads, int head_dim, int max_keys) {
  return internal::TileScratchBytes(num_heads / num_kv_heads, head_dim, max_keys);
}

absl::Status ValidateDmsPrefillAttention(const DmsPrefillAttentionParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateHeadDim(p.layout.head_dim));
  if (p.num_tokens < 0 || p.num_heads < 1 || p.num_kv_heads < 1 ||
      p.num_heads % p.num_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("dms_prefill_attention: num_tokens=", p.num_tokens, " num_heads=", p.num_heads,
                     " num_kv_heads=", p.num_kv_heads));
  }
  if (p.spans == nullptr || p.q == nullptr || p.rows == nullptr || p.scratch == nullptr) {
    return absl::InvalidArgumentError("dms_prefill_attention: spans, q, rows or scratch is null");
  }
  if ((p.out_f32 == nullptr) == (p.out_bf16 == nullptr)) {
    return absl::InvalidArgumentError(
        "dms_prefill_attention: not exactly one of out_f32 and out_bf16 is set");
  }
  const size_t needed =
      AttentionScratchBytes(p.num_heads, p.num_kv_heads, p.layout.head_dim, MaxKeys(p));
  if (p.scratch->bytes_each() < needed) {
    return absl::InvalidArgumentError(absl::StrCat("dms_prefill_attention: scratch of ",
                                                   p.scratch->bytes_each(), " bytes a thread, ",
                                                   needed, " needed"));
  }
  return absl::OkStatus();
}

absl::Status DmsPrefillAttentionCpu(const DmsPrefillAttentionParams& p, ThreadPool* pool) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillAttention(p));
  const int head_dim = p.layout.head_dim;
  const int group = p.num_heads / p.num_kv_heads;
  const int tile_queries = internal::TileQueries(group, MaxKeys(p));
  const int num_tiles = (p.num_tokens + tile_queries - 1) / tile_queries;
  const int64_t token_bytes = static_cast<int64_t>(TokenBytes(p.layout.format, head_dim));
  ParallelRange(pool, num_tiles * p.num_kv_heads, 1, [&](int begin, int end) {
    ThreadScratch::Lease lease(p.scratch);
    for (int item = begin; item < end; ++item) {
      const int g = item % p.num_kv_heads;
      // The last tile sees the most keys: it goes first.
      const int first = (num_tiles - 1 - item / p.num_kv_heads) * tile_queries;
      const int64_t offset =
          (static_cast<int64_t>(first) * p.num_heads + static_cast<int64_t>(g) * group) * head_dim;
      internal::RunAttentionTile(
          {.source = {.layout = p.layout,
                      .span = &p.spans[g],
                      .rows = p.rows + g * token_bytes,
                      .row_stride = p.num_kv_heads * token_bytes,
                      .decisions = p.decisions == nullptr ? nullptr : p.decisions + g,
                      .decision_stride = p.num_kv_heads,
                      .chunk_tokens = p.num_tokens},
           .q = p.q + offset,
           .query_stride = static_cast<int64_t>(p.num_heads) * head_dim,
           .out_f32 = p.out_f32 == nullptr ? nullptr : p.out_f32 + offset,
           .out_bf16 = p.out_bf16 == nullptr ? nullptr : p.out_bf16 + offset,
           .first_query = p.spans[g].num_tokens + first,
           .num_queries = std::min(tile_queries, p.num_tokens - first),
           .group = group,
           .scale = p.scale,
           .scratch = lease.data()});
    }
  });
  return absl::OkStatus();
}

}  // namespace winnow::kernels
