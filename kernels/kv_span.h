#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kv_format.h"

// A span: the live tokens of one (sequence, layer, KV head), oldest first
//   survivors (pages, append-only) | ring (at most `window` tokens) | newest (flat row)
// When token t arrives, the old newest enters the ring; if the ring already
// holds `window` tokens, its oldest leaves first: kept, it is copied to the end
// of the survivors, evicted, it is gone. So query t sees the whole span, which
// is { j <= t : t - j <= window or kept(j) }. With window 0 there is no ring
// and every token becomes a survivor, whatever its bit (the dense modes).
namespace winnow::kernels {

inline constexpr int kSegmentPages = 64;

// A piece of a page table, from a pool of its own.
struct PageSegment {
  int32_t page[kSegmentPages];
  PageSegment* next = nullptr;
};

struct PageTable {
  PageSegment* head = nullptr;
  PageSegment* tail = nullptr;
  int num_pages = 0;

  // REQUIRES: 0 <= i < num_pages.
  int32_t At(int i) const {
    const PageSegment* segment = head;
    for (; i >= kSegmentPages; i -= kSegmentPages) segment = segment->next;
    return segment->page[i];
  }
};

// What all spans of a cache share.
struct KvLayout {
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 0;
  int window = 0;            // W: distance up to which a token is always visible; 0: dense
  int shift = 1;             // 1: the bit of token t decides token t - 1; 0: token t itself
  uint8_t* pages = nullptr;  // page p starts at pages + p * page_bytes
  size_t page_bytes = 0;
  int slots_per_page = 0;

  uint8_t* Page(int32_t page) const {
    return pages + static_cast<int64_t>(page) * static_cast<int64_t>(page_bytes);
  }
};

struct Span {
  PageTable survivors;
  PageTable ring;
  uint8_t* newest = nullptr;      // flat row; meaningless while num_tokens == 0
  uint8_t* ring_evict = nullptr;  // [window]; by ring slot, 1: evict on leaving
  int num_survivors = 0;
  int num_ring = 0;          // min(window, num_tokens - 1)
  int ring_start = 0;        // ring slot of the oldest token
  int num_tokens = 0;        // logical: all tokens that ever entered
  uint8_t newest_evict = 0;  // shift 0: the newest token's own bit; shift 1: 0

  int num_live() const { return num_survivors + num_ring + (num_tokens > 0 ? 1 : 0); }
};

// Token `i` in age order, 0 <= i < num_live().
TokenRef SpanToken(const KvLayout& layout, const Span& span, int i);

// Pages that the span's tables must gain before `num_tokens` more tokens whose
// bits are `evict` [num_tokens] (stride elements apart; null: all keep) enter.
struct PageNeed {
  int ring = 0;
  int survivors = 0;
};
PageNeed CountPageNeed(const KvLayout& layout, const Span& span, int num_tokens,
                       const uint8_t* evict, int64_t stride);

// The arrival of one token with its own bit `evict`. REQUIRES: the tables hold
// the pages that CountPageNeed() asks for. Touches this span alone.
void AdvanceSpan(const KvLayout& layout, Span* span, const uint8_t* row, uint8_t evict);

}  // namespace winnow::kernels
