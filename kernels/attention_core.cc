#include "kernels/attention_core.h"

#include <algorithm>
#include <climits>
#include <cstring>

namespace winnow::kernels::internal {

KeyCursor::KeyCursor(const KeySource& source, KvPart part, int first_query, int last_query)
    : source_(source),
      part_(part),
      element_(part == KvPart::kK ? KvFormatOf(source.layout.format).k
                                  : KvFormatOf(source.layout.format).v),
      first_query_(first_query),
      num_chunk_(source.chunk_tokens == 0 ? 0 : last_query - source.span->num_tokens + 1),
      base_(source.span->num_tokens),
      newest_done_(source.span->num_tokens == 0) {}

KeyCursor::Run KeyCursor::SlotRun(const PageTable& table, int slot, int max_count) const {
  const KvLayout& layout = source_.layout;
  const int in_page = slot % layout.slots_per_page;
  const TokenRef ref = PageToken(layout.format, layout.head_dim,
                                 layout.Page(table.At(slot / layout.slots_per_page)), in_page);
  return {.element = part_ == KvPart::kK ? ref.k : ref.v,
          .scale = part_ == KvPart::kK ? ref.k_scale : ref.v_scale,
          .stride = static_cast<int64_t>(KvElementBytes(element_)) * layout.head_dim,
          .scale_stride = static_cast<int64_t>(KvScaleBytes(element_)),
          .count = std::min(max_count, layout.slots_per_page - in_page)};
}

KeyCursor::Run KeyCursor::RowRun(const uint8_t* row, int64_t stride, int count) const {
  const TokenRef ref = RowToken(source_.layout.format, source_.layout.head_dim, row);
  return {.element = part_ == KvPart::kK ? ref.k : ref.v,
          .scale = part_ == KvPart::kK ? ref.k_scale : ref.v_scale,
          .stride = stride,
          .scale_stride = stride,
          .count = count};
}

// Keys that every query sees; where they once stood does not matter.
void KeyCursor::PushVisible(const Run& run, KeyBlock* block) const {
  const int at = block->count;
  for (int i = 0; i < run.count; ++i) {
    block->element[at + i] = run.element + i * run.stride;
    block->pos[at + i] = -1;
    block->limit[at + i] = INT32_MAX;
  }
  std::memcpy(block->scale + at, run.scale,
              static_cast<size_t>(run.count) * static_cast<size_t>(run.scale_stride));
  block->count += run.count;
  block->max_pos = -1;
}

void KeyCursor::Push(const Run& run, int i, bool evict, KeyBlock* block) const {
  const int32_t pos = run.pos + i;
  const int32_t limit = evict ? pos + source_.layout.window + 1 : INT32_MAX;
  if (limit <= first_query_) return;
  const int at = block->count++;
  block->element[at] = run.element + i * run.stride;
  block->pos[at] = pos;
  block->limit[at] = limit;
  if (KvScaleBytes(element_) > 0) {
    std::memcpy(block->scale + at, run.scale + i * run.scale_stride, 2);
  }
  block->max_pos = pos;
  block->min_limit = std::min(block->min_limit, limit);
}

void KeyCursor::AddSurvivors(int room, KeyBlock* block) {
  const Span& span = *source_.span;
  const Run run =
      SlotRun(span.survivors, survivor_, std::min(room, span.num_survivors - survivor_));
  PushVisible(run, block);
  survivor_ += run.count;
}

void KeyCursor::AddRing(int room, KeyBlock* block) {
  const Span& span = *source_.span;
  const int window = source_.layout.window;
  int slot = span.ring_start + ring_;
  int until = span.num_ring - ring_;
  if (slot >= window) {
    slot -= window;
  } else {
    until = std::min(until, window - slot);
  }
  Run run = SlotRun(span.ring, slot, std::min(room, until));
  run.pos = base_ - 1 - span.num_ring + ring_;
  for (int i = 0; i < run.count; ++i) Push(run, i, span.ring_evict[slot + i] != 0, block);
  ring_ += run.count;
}

void KeyCursor::AddNewest(KeyBlock* block) {
  const Span& span = *source_.span;
  Run run = RowRun(span.newest, 0, 1);
  run.pos = base_ - 1;
  Push(run, 0, source_.layout.shift == 1 ? ChunkBit(0) : span.newest_evict != 0, block);
  newest_done_ = true;
}

void KeyCursor::AddChunk(KeyBlock* block) {
  const int shift = source_.layout.shift;
  Run run = RowRun(source_.rows, source_.row_stride, num_chunk_);
  run.pos = base_;
  for (; chunk_ < num_chunk_ && block->count < kBlockKeys; ++chunk_) {
    Push(run, chunk_, ChunkBit(chunk_ + shift), block);
  }
}

// The bit of the chunk's token t; the next chunk's is not known and not needed.
bool KeyCursor::ChunkBit(int t) const {
  return source_.decisions != nullptr && source_.layout.window > 0 && t < source_.chunk_tokens &&
         source_.decisions[t * source_.decision_stride] != 0;
}

bool KeyCursor::Next(KeyBlock* block) {
  const Span& span = *source_.span;
  block->count = 0;
  block->min_limit = INT32_MAX;
  while (block->count < kBlockKeys) {
    const int room = kBlockKeys - block->count;
    if (survivor_ < span.num_survivors) {
      AddSurvivors(room, block);
    } else if (ring_ < span.num_ring) {
      AddRing(room, block);
    } else if (!newest_done_) {
      AddNewest(block);
    } else if (chunk_ < num_chunk_) {
      AddChunk(block);
    } else {
      break;
    }
  }
  if (block->count == 0) return false;
  block->min_pos = block->pos[0];
  for (int i = block->count; i < kBlockKeys; ++i) {
    block->element[i] = block->element[0];  // read, but masked
    block->scale[i] = block->scale[0];
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
  const size_t blocks = dim * kBlockKeys * sizeof(float);
  const size_t per_row = (2 * dim + kBlockKeys + 1) * sizeof(float);
  const int fewest = std::min(kMinTileQueries, static_cast<int>(rows) / group);
  return blocks + rows * per_row + std::max(kScoreBytes, ScoreBytes(fewest * group, max_keys)) +
         1024;
}

}  // namespace winnow::kernels::internal
