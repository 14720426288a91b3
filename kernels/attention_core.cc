#include "kernels/attention_core.h"

#include <algorithm>
#include <climits>

namespace winnow::kernels::internal {

KeyCursor::KeyCursor(const KeySource& source, int first_query, int last_query)
    : source_(source),
      first_query_(first_query),
      num_chunk_(source.chunk_tokens == 0 ? 0 : last_query - source.span->num_tokens + 1),
      base_(source.span->num_tokens) {}

KeyCursor::Run KeyCursor::SlotRun(const PageTable& table, int slot, int max_count) const {
  const KvLayout& layout = source_.layout;
  const int in_page = slot % layout.slots_per_page;
  return {.ref = PageToken(layout.format, layout.head_dim,
                           layout.Page(table.At(slot / layout.slots_per_page)), in_page),
          .stride = static_cast<int64_t>(KvElementBytes(layout.format)) * layout.head_dim,
          .scale_stride = static_cast<int64_t>(KvScaleBytes(layout.format)),
          .count = std::min(max_count, layout.slots_per_page - in_page)};
}

void KeyCursor::Push(const TokenRef& ref, int32_t pos, bool evict, KeyBlock* block) {
  const int32_t limit = evict ? pos + source_.layout.window + 1 : INT32_MAX;
  if (limit <= first_query_) return;
  block->ref[block->count] = ref;
  block->pos[block->count] = pos;
  block->limit[block->count] = limit;
  ++block->count;
  block->max_pos = pos;
  block->min_limit = std::min(block->min_limit, limit);
}

bool KeyCursor::Next(KeyBlock* block) {
  const KvLayout& layout = source_.layout;
  const Span& span = *source_.span;
  const int ring_begin = span.num_survivors;
  const int newest = ring_begin + span.num_ring;
  const int chunk_begin = span.num_live();
  const int end = chunk_begin + num_chunk_;
  const bool evicting = layout.window > 0;
  const bool chunk_bits = evicting && source_.decisions != nullptr;
  const auto chunk_bit = [&](int t) {
    return chunk_bits && t < source_.chunk_tokens &&
           source_.decisions[t * source_.decision_stride] != 0;
  };
  if (next_ >= end) return false;
  block->count = 0;
  block->min_limit = INT32_MAX;
  while (block->count < kBlockKeys && next_ < end) {
    const int room = kBlockKeys - block->count;
    if (next_ < newest) {
      const bool in_ring = next_ >= ring_begin;
      Run run;
      int ring_slot = 0;
      if (in_ring) {
        ring_slot = span.ring_start + (next_ - ring_begin);
        int until = std::min(newest - next_, layout.window - ring_slot);
        if (ring_slot >= layout.window) {
          ring_slot -= layout.window;
          until = newest - next_;
        }
        run = SlotRun(span.ring, ring_slot, std::min(room, until));
      } else {
        run = SlotRun(span.survivors, next_, std::min(room, ring_begin - next_));
      }
      for (int i = 0; i < run.count; ++i) {
        const TokenRef ref = {.k = run.ref.k + i * run.stride,
                              .v = run.ref.v + i * run.stride,
                              .k_scale = run.ref.k_scale + i * run.scale_stride,
                              .v_scale = run.ref.v_scale + i * run.scale_stride};
        // A survivor is visible to all; where it once stood does not matter.
        const int32_t pos = in_ring ? base_ - 1 - span.num_ring + (next_ - ring_begin) + i : -1;
        Push(ref, pos, in_ring && span.ring_evict[ring_slot + i] != 0, block);
      }
      next_ += run.count;
    } else if (next_ < chunk_begin) {
      const bool evict = layout.shift == 1 ? chunk_bit(0) : span.newest_evict != 0;
      Push(RowToken(layout.format, layout.head_dim, span.newest), base_ - 1, evicting && evict,
           block);
      ++next_;
    } else {
      const int t = next_ - chunk_begin;
      Push(RowToken(layout.format, layout.head_dim, source_.rows + t * source_.row_stride),
           base_ + t, chunk_bit(layout.shift == 1 ? t + 1 : t), block);
      ++next_;
    }
  }
  if (block->count == 0) return false;
  block->min_pos = block->pos[0];
  for (int i = block->count; i < kBlockKeys; ++i) {
    block->pos[i] = INT32_MAX;
    block->limit[i] = INT32_MAX;
  }
  return true;
}

namespace {

constexpr int kTileRows = 96;
constexpr int kMaxTileQueries = 32;
constexpr int kMinTileQueries = 4;
constexpr size_t kScoreBytes = 512 << 10;  // half of a core's L2

size_t ScoreBytes(int rows, int max_keys) {
  const size_t padded = (static_cast<size_t>(max_keys) + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
  return static_cast<size_t>(rows) * padded * sizeof(float);
}

}  // namespace

int TileQueries(int group, int max_keys) {
  int queries = std::clamp(kTileRows / group, 1, kMaxTileQueries);
  while (queries > kMinTileQueries && ScoreBytes(queries * group, max_keys) > kScoreBytes) {
    queries = std::max(queries / 2, kMinTileQueries);
  }
  return queries;
}

size_t TileScratchBytes(int group, int head_dim, int max_keys) {
  const size_t dim = static_cast<size_t>(head_dim);
  const size_t rows = static_cast<size_t>(group) *
                      static_cast<size_t>(std::clamp(kTileRows / group, 1, kMaxTileQueries));
  const size_t blocks = 2 * dim * kBlockKeys * sizeof(float) + dim * kBlockKeys;
  const size_t per_row = (2 * dim + kBlockKeys + 1) * sizeof(float);
  const int fewest = std::min(kMinTileQueries, static_cast<int>(rows) / group);
  return blocks + rows * per_row + std::max(kScoreBytes, ScoreBytes(fewest * group, max_keys)) +
         1024;
}

}  // namespace winnow::kernels::internal
