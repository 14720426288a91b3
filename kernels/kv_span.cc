#include "kernels/kv_span.h"

#include <algorithm>
#include <cstring>

#include "common/base/check.h"

namespace winnow::kernels {
namespace {

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

TokenRef TableToken(const KvLayout& layout, const PageTable& table, int slot) {
  return PageToken(layout.format, layout.head_dim,
                   layout.Page(table.At(slot / layout.slots_per_page)),
                   slot % layout.slots_per_page);
}

// Stored bytes of a flat row into `slot` of a table.
void PutRow(const KvLayout& layout, const PageTable& table, int slot, const uint8_t* row) {
  const int page_idx = slot / layout.slots_per_page;
  WINNOW_CHECK(page_idx < table.num_pages);
  CopyRowToPage(layout.format, layout.head_dim, row, layout.Page(table.At(page_idx)),
                slot % layout.slots_per_page);
}

int RingSlot(const KvLayout& layout, const Span& span, int i) {
  const int slot = span.ring_start + i;
  return slot >= layout.window ? slot - layout.window : slot;
}

}  // namespace

TokenRef SpanToken(const KvLayout& layout, const Span& span, int i) {
  if (i < span.num_survivors) return TableToken(layout, span.survivors, i);
  i -= span.num_survivors;
  if (i < span.num_ring) return TableToken(layout, span.ring, RingSlot(layout, span, i));
  return RowToken(layout.format, layout.head_dim, span.newest);
}

PageNeed CountPageNeed(const KvLayout& layout, const Span& span, int num_tokens,
                       const uint8_t* evict, int64_t stride) {
  if (num_tokens <= 0) return {};
  // The tokens that this arrival moves out of the flat row: the old newest, then
  // all new ones but the last. `num_out` of the line ring | old newest | new
  // tokens leave the ring, oldest first.
  const int entering = num_tokens - (span.num_tokens == 0 ? 1 : 0);
  const int ring = std::min(layout.window, span.num_ring + entering);
  const int num_out = span.num_ring + entering - ring;
  const auto own_bit = [&](int t) {  // of new token t
    return evict != nullptr && layout.window > 0 && evict[t * stride] != 0;
  };
  int kept = 0;
  for (int i = 0; i < num_out; ++i) {
    bool evicted;
    if (i < span.num_ring) {
      evicted = span.ring_evict[RingSlot(layout, span, i)] != 0;
    } else {
      const int entered = i - span.num_ring;                   // in the order of entering
      const int t = entered - (span.num_tokens == 0 ? 0 : 1);  // -1: the old newest
      if (layout.shift == 1) {
        evicted = own_bit(t + 1);
      } else {
        evicted = t < 0 ? span.newest_evict != 0 : own_bit(t);
      }
    }
    kept += evicted ? 0 : 1;
  }
  return {.ring = CeilDiv(ring, layout.slots_per_page) - span.ring.num_pages,
          .survivors =
              CeilDiv(span.num_survivors + kept, layout.slots_per_page) - span.survivors.num_pages};
}

void AdvanceSpan(const KvLayout& layout, Span* span, const uint8_t* row, uint8_t evict) {
  const size_t token_bytes = TokenBytes(layout.format, layout.head_dim);
  if (span->num_tokens > 0) {
    if (layout.window == 0) {
      PutRow(layout, span->survivors, span->num_survivors++, span->newest);
    } else {
      const uint8_t flag = (layout.shift == 1 ? evict : span->newest_evict) != 0 ? 1 : 0;
      int slot = span->num_ring;
      if (slot < layout.window) {
        ++span->num_ring;
      } else {
        slot = span->ring_start;
        if (span->ring_evict[slot] == 0) {
          uint8_t moved[kMaxTokenBytes];
          CopyPageToRow(layout.format, layout.head_dim,
                        layout.Page(span->ring.At(slot / layout.slots_per_page)),
                        slot % layout.slots_per_page, moved);
          PutRow(layout, span->survivors, span->num_survivors++, moved);
        }
        span->ring_start = slot + 1 == layout.window ? 0 : slot + 1;
      }
      PutRow(layout, span->ring, slot, span->newest);
      span->ring_evict[slot] = flag;
    }
  }
  std::memcpy(span->newest, row, token_bytes);
  span->newest_evict = layout.window > 0 && layout.shift == 0 && evict != 0 ? 1 : 0;
  ++span->num_tokens;
}

}  // namespace winnow::kernels
