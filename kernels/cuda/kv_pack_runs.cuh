#pragma once

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/cuda/device_spans.h"
#include "kernels/cuda/layer_spans.cuh"
#include "kernels/kv_pack.h"

// What packing and unpacking share. A warp moves a run of tokens, neighbours in age, through
// shared memory: between pages and there in pieces of 16 bytes, of which K and V are whole numbers
// of, and between there and the wire, where rows may start at any byte, in aligned 16 bytes too.
namespace winnow::kernels::internal {

inline constexpr int kPackThreads = 256, kPackWarps = kPackThreads / 32;
inline constexpr int kPackAlign = 16;      // of items in staging
inline constexpr int kRunPieces = 8 * 32;  // of a run, at most
// Of shared memory a warp: pieces, scales, and what a row's first and last byte share words with.
inline constexpr int kRunWords = 4 * kRunPieces + 32 + 8;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// A layer of a sequence is an item; a head of an item its own block or blocks.
struct PackArgs {
  LayerSpans spans;  // of layer 0: with those of the other layers behind them
  const int32_t* slots;
  int64_t page_bytes;
  int shift, max_sequences, num_kv_heads;
  int num_items, first_layer, num_layers, slots_per_page;
  int k_bytes, v_bytes;  // of a flat row
  bool scaled;
  int run_tokens;

  __host__ __device__ int row_bytes() const { return k_bytes + v_bytes + (scaled ? 4 : 0); }
};

inline PackArgs MakePackArgs(const DeviceSpans& spans, const int32_t* slots, int num_seqs,
                             int first_layer, int num_layers) {
  const KvFormat& f = KvFormatOf(spans.format);
  const int k_bytes = static_cast<int>(KvElementBytes(f.k)) * spans.head_dim;
  const int v_bytes = static_cast<int>(KvElementBytes(f.v)) * spans.head_dim;
  return {.spans = LayerOf(spans, 0),
          .slots = slots,
          .page_bytes = static_cast<int64_t>(PageBytes(spans.head_dim)),
          .shift = spans.shift,
          .max_sequences = spans.max_sequences,
          .num_kv_heads = spans.num_kv_heads,
          .num_items = num_seqs * num_layers,
          .first_layer = first_layer,
          .num_layers = num_layers,
          .slots_per_page = spans.slots_per_page(),
          .k_bytes = k_bytes,
          .v_bytes = v_bytes,
          .scaled = KvScaleBytes(f.k) > 0,
          .run_tokens = std::min(32, 16 * kRunPieces / (k_bytes + v_bytes))};
}

absl::Status ValidatePackSpans(const char* op, const DeviceSpans& spans, int num_seqs,
                               int first_layer, int num_layers);

// Blocks for a head: as many as the largest has work for, within what fills the device.
inline dim3 PackGrid(const DeviceSpans& spans, const PackArgs& a) {
  const int64_t most_tokens =
      int64_t{spans.max_survivor_pages} * spans.slots_per_page() + spans.window + 1;
  const int64_t block_tokens = int64_t{kPackWarps} * a.run_tokens;
  const int64_t heads = int64_t{a.num_items} * spans.num_kv_heads;
  const int64_t blocks =
      std::min((most_tokens + block_tokens - 1) / block_tokens, std::max<int64_t>(4096 / heads, 8));
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(spans.num_kv_heads),
              static_cast<unsigned>(a.num_items));
}

// The span of an item's first head; -1: no sequence.
__device__ __forceinline__ int64_t FirstSpan(const PackArgs& a, int item) {
  const int slot = a.slots[item / a.num_layers];
  if (slot < 0) return -1;
  const int64_t layer = a.first_layer + item % a.num_layers;
  return (layer * a.max_sequences + slot) * a.num_kv_heads;
}

__device__ __forceinline__ int64_t BodyBytes(const PackArgs& a, const SpanState& state) {
  return (int64_t{state.num_survivors} + state.num_ring + 1) * a.row_bytes() + state.num_ring;
}

// Where the rows of head `g` start in the item; state_of(h) is head h's. A whole warp.
template <typename StateOf>
__device__ __forceinline__ int64_t BodyOffset(const PackArgs& a, int g, StateOf state_of) {
  int64_t bytes = 0;
  for (int h = static_cast<int>(threadIdx.x) % 32; h < g; h += 32) {
    bytes += BodyBytes(a, state_of(h));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    bytes += __shfl_xor_sync(kWholeWarp, static_cast<long long>(bytes), step);
  }
  return bytes + a.num_kv_heads * static_cast<int64_t>(kPackedHeadBytes);
}

// Where the parts of a token lie; k null: it has no page.
struct TokenPlace {
  uint8_t* k = nullptr;
  int v = 0, k_scale = 0, v_scale = 0;  // from k on
};

// Of token `i` of a span, in age order.
__device__ __forceinline__ TokenPlace PlaceOf(const PackArgs& a, int64_t span,
                                              const SpanState& state, int i) {
  uint8_t* base = a.spans.newest + span * a.spans.newest_stride;
  int slots = 1, slot = 0;
  if (i < state.num_survivors + state.num_ring) {
    const bool ring = i >= state.num_survivors;
    slots = a.slots_per_page;
    slot = i;
    if (ring) {
      slot = i - state.num_survivors + state.ring_start;
      if (slot >= a.spans.window) slot -= a.spans.window;
    }
    const int table_size = ring ? a.spans.ring_pages_per_span : a.spans.max_survivor_pages;
    const int32_t* table = (ring ? a.spans.ring_pages : a.spans.survivor_pages) + span * table_size;
    const int entry = slot / slots;
    const int page = entry < table_size ? table[entry] : -1;
    if (page < 0) return {};
    base = a.spans.pages + page * a.page_bytes;
    slot -= entry * slots;
  }
  const int scales = slots * (a.k_bytes + a.v_bytes) + 2 * slot - slot * a.k_bytes;
  return {.k = base + slot * a.k_bytes,
          .v = slots * a.k_bytes + slot * (a.v_bytes - a.k_bytes),
          .k_scale = scales,
          .v_scale = scales + 2 * slots};
}

// The pieces of a run that a lane moves, every 32nd of [tokens][K and V of a row].
class RunPieces {
 public:
  struct Piece {
    int word;   // of the run's rows; below 0: past the run
    uint4* at;  // in a page; null: there is none
  };

  // Lane t has the place of token t < num.
  __device__ RunPieces(const PackArgs& a, const TokenPlace& place, int num)
      : place_(place),
        num_(num),
        row_words_(a.row_bytes() / 4),
        k_columns_(a.k_bytes / 16),
        columns_((a.k_bytes + a.v_bytes) / 16) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    token_ = lane / columns_;
    column_ = lane - token_ * columns_;
    step_ = 32 / columns_;
  }
  // The lane's next piece. The whole warp, whatever it has left.
  __device__ __forceinline__ Piece Next() {
    const auto own = reinterpret_cast<unsigned long long>(place_.k);
    auto* k = reinterpret_cast<uint8_t*>(__shfl_sync(kWholeWarp, own, token_));
    const int v = __shfl_sync(kWholeWarp, place_.v, token_) - 16 * k_columns_;
    uint8_t* at = k + 16 * column_ + (column_ >= k_columns_ ? v : 0);
    const Piece piece{token_ < num_ ? token_ * row_words_ + 4 * column_ : -1,
                      k == nullptr ? nullptr : reinterpret_cast<uint4*>(at)};
    token_ += step_;
    column_ += 32 - step_ * columns_;
    if (column_ >= columns_) {
      column_ -= columns_;
      ++token_;
    }
    return piece;
  }

 private:
  const TokenPlace& place_;
  const int num_, row_words_, k_columns_, columns_;
  int token_, column_, step_;
};

}  // namespace winnow::kernels::internal
