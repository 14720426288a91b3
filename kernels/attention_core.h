#pragma once

#include <cstddef>
#include <cstdint>

#include "common/base/bf16.h"
#include "kernels/kv_span.h"

// Shared by dms_prefill_attention and compact_decode_attention; not for others.
namespace winnow::kernels::internal {

inline constexpr int kBlockKeys = 32;

// All keys of one KV head that queries of a chunk may see: a span's tokens, then
// the chunk's. A decode step has no chunk: its query is the span's newest token.
struct KeySource {
  KvLayout layout;
  const Span* span = nullptr;
  const uint8_t* rows = nullptr;       // the chunk's flat rows of this head
  int64_t row_stride = 0;              // bytes
  const uint8_t* decisions = nullptr;  // the chunk's bits of this head; null: all keep
  int64_t decision_stride = 0;
  int chunk_tokens = 0;
};

enum class KvPart { kK, kV };

// Up to kBlockKeys keys in ascending position, and where their K or V is stored.
struct KeyBlock {
  int count = 0;
  const uint8_t* element[kBlockKeys];
  alignas(64) uint16_t scale[kBlockKeys];  // float16; unset if the elements have none
  // Key i is visible to query position p iff pos[i] <= p < limit[i]. Unused
  // places have pos = INT32_MAX.
  int32_t pos[kBlockKeys];
  int32_t limit[kBlockKeys];
  int32_t min_pos = 0, max_pos = 0, min_limit = 0;
};

// Walks the keys that some query in [first_query, last_query] sees, and of the
// others at most such as lie in the window of one of them.
class KeyCursor {
 public:
  KeyCursor(const KeySource& source, KvPart part, int first_query, int last_query);
  // False at the end; then *block is undefined.
  bool Next(KeyBlock* block);

 private:
  // Tokens at equal distances.
  struct Run {
    const uint8_t* element = nullptr;
    const uint8_t* scale = nullptr;
    int64_t stride = 0, scale_stride = 0;  // bytes
    int count = 0;
    int32_t pos = 0;  // of the first
  };
  Run SlotRun(const PageTable& table, int slot, int max_count) const;
  Run RowRun(const uint8_t* row, int64_t stride, int count) const;
  void AddSurvivors(int room, KeyBlock* block);
  void AddRing(int room, KeyBlock* block);
  void AddNewest(KeyBlock* block);
  void AddChunk(KeyBlock* block);
  void PushVisible(const Run& run, KeyBlock* block) const;
  void Push(const Run& run, int i, bool evict, KeyBlock* block) const;
  bool ChunkBit(int t) const;

  const KeySource& source_;
  const KvPart part_;
  const KvElement element_;  // the part's
  const int first_query_;
  const int num_chunk_;                      // the chunk's tokens up to last_query
  const int base_;                           // position of the chunk's first token
  int survivor_ = 0, ring_ = 0, chunk_ = 0;  // the next of each
  bool newest_done_;
};

// One tile of queries of one KV head.
struct AttentionTile {
  KeySource source;
  const float* q = nullptr;  // first query's first head of the group, [group, head_dim]
  int64_t query_stride = 0;  // elements from one query to the next, in q and out
  float* out_f32 = nullptr;
  Bf16* out_bf16 = nullptr;
  int first_query = 0;  // absolute position
  int num_queries = 0;
  int group = 0;  // query heads a KV head
  float scale = 0.0f;
  uint8_t* scratch = nullptr;
};

// Queries a tile takes when none sees more than max_keys keys.
int TileQueries(int group, int max_keys);
size_t TileScratchBytes(int group, int head_dim, int max_keys);

void RunAttentionTile(const AttentionTile& tile);

}  // namespace winnow::kernels::internal
