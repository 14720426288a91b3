#pragma once

#include "kernels/cuda/dms_prefill.h"

// What the two prefill ops share on the device.
namespace winnow::kernels::internal {

// Query rows of a block's tile: as many positions as fit, each with its `group` heads.
template <int kDim>
inline constexpr int kTileRows = kDim == 64 ? 192 : 128;
inline int TilePositions(int head_dim, int group) {
  return (head_dim == 64 ? kTileRows<64> : kTileRows<128>) / group;
}

// A tile of the attention: positions [first, first + TilePositions) of the chunk.
struct alignas(16) PrefillTile {
  int32_t sequence, head, first;
  int32_t num_survivors;  // survivors older than the window of all its rows
};

// The scratch, in this order.
struct PrefillScratch {
  int32_t* ticket;     // [64]: the next tile to take; padded
  int32_t* num_tiles;  // [64]
  // [num_kv_heads, band_rows]: 2 * (survivors before this band row) + (this row is kept)
  int32_t* marks;
  PrefillTile* tiles;  // [max tiles], longest first
};

inline int MaxTiles(const DmsPrefillBatch& b) {
  const int positions = TilePositions(b.head_dim, b.group);
  return ((b.num_rows + positions - 1) / positions + b.batch) * b.num_kv_heads;
}

inline PrefillScratch ScratchOf(const DmsPrefillBatch& b) {
  auto* base = static_cast<uint8_t*>(b.scratch);
  const size_t marks =
      (size_t{4} * static_cast<size_t>(b.num_kv_heads) * static_cast<size_t>(b.band_rows) + 255) /
      256 * 256;
  return {.ticket = reinterpret_cast<int32_t*>(base),
          .num_tiles = reinterpret_cast<int32_t*>(base + 256),
          .marks = reinterpret_cast<int32_t*>(base + 512),
          .tiles = reinterpret_cast<PrefillTile*>(base + 512 + marks)};
}

// Of a band of `band` tokens: how many, from the oldest on, may be older than the
// window of some query, and so are laid out if kept.
__host__ __device__ inline int NumExpirable(int band, int window) {
  const int n = band - 1 - window;
  return n > 0 ? n : 0;
}

}  // namespace winnow::kernels::internal
