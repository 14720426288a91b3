#pragma once

#include "kernels/cuda/dms_prefill_list.cuh"

// The keys of a tile as one list, as dms_prefill_list.cuh has it, but in blocks of 16 rows,
// which begin at multiples of 16 in the band and among the survivors:
//
//   old    [0, new_at)               from the band's block with the oldest key that some row
//                                    has in its window
//   new    [new_at, edge_end)        from the block of the first row's own key on
//   middle [edge_end, survivors_at)  the blocks between, which every row sees
//   then                             survivors older than every row's window
//
// With no block between, all is old and there is no new part.
namespace winnow::kernels::internal {

// Boxes with old or new keys: at most, of tiles of `positions` positions.
constexpr int MaxFp8EdgeBoxes(int positions) {
  return (2 * positions + 60 + kBoxKeys - 1) / kBoxKeys;
}

// A tile as the block's threads need it.
struct Fp8TileWork {
  int32_t head;  // or kEndOfTiles
  int32_t new_at, edge_end, survivors_at, num_keys;
  int32_t lead;         // columns before the oldest key of the first row's window
  int32_t own_old;      // the column of the first row's own key, if old went on to it
  int32_t own_new;      // if new went back to it
  int32_t old_row;      // band row of the first old key
  int32_t new_row;      // of the first new key
  int32_t middle_row;   // of the first middle key
  int32_t compact_row;  // of the first survivor
  int32_t row;          // of the first position in q and out
  int32_t num_positions;
};

__host__ __device__ constexpr int RoundUpTo16(int x) { return (x + 15) & ~15; }

// Which of lane i's columns lie below the list's end.
__device__ __forceinline__ uint32_t ColumnsOfList(const Fp8TileWork& w, int box, int i) {
  return LowBits(OwnColumnsBelow(w.num_keys - box * kBoxKeys, i));
}

// The list of a tile.
__device__ __forceinline__ Fp8TileWork MakeFp8TileWork(const PrefillTile& tile,
                                                       const DmsPrefillSequence& s, int positions,
                                                       int window) {
  const int first = s.num_prefix + tile.first;  // in the band, as all up to the rows
  const int oldest = max(0, first - window);
  Fp8TileWork w{.head = tile.head};
  w.num_positions = min(positions, s.num_tokens - tile.first);
  const int old_begin = oldest & ~15, end = RoundUpTo16(first + w.num_positions);
  const int middle = RoundUpTo16(max(oldest, first + w.num_positions - 1 - window));
  const int new_begin = first & ~15;
  const bool split = middle < new_begin;
  w.new_at = (split ? middle : end) - old_begin;
  w.edge_end = w.new_at + (split ? end - new_begin : 0);
  w.survivors_at = w.edge_end + (split ? new_begin - middle : 0);
  w.num_keys = w.survivors_at + tile.num_survivors;
  w.lead = oldest - old_begin;
  w.own_old = first - old_begin;
  w.own_new = w.new_at + first - new_begin;
  w.old_row = s.band_row + old_begin;
  w.new_row = s.band_row + new_begin;
  w.middle_row = s.band_row + middle;
  w.compact_row = s.compact_row;
  w.row = s.row + tile.first;
  return w;
}

// `marks` are those of the head.
template <int kPositions>
__device__ __forceinline__ void FindSeen(const Fp8TileWork& w, const int32_t* marks, int window,
                                         uint32_t (*seen)[kPositions][4]) {
  const auto mark_of = [&](int column) {
    const bool old = column < w.new_at;
    const bool is_key =
        column < w.edge_end && column < (old ? w.own_old : w.own_new) + w.num_positions;
    return is_key ? marks[old ? w.old_row + column : w.new_row + column - w.new_at] : 0;
  };
  const auto edge_of = [&](auto below, uint32_t kept) {
    const uint32_t is_old = below(w.new_at);
    const uint32_t old = is_old & ~below(w.lead), fresh = below(w.edge_end) & ~is_old;
    return [=, &w](int p) {
      const auto of = [&](int own) { return below(own + 1) & (kept | ~below(own - window)); };
      return (old & of(w.own_old + p)) | (fresh & of(w.own_new + p));
    };
  };
  FindSeenBy<kPositions>(w, mark_of, edge_of, seen);
}

}  // namespace winnow::kernels::internal
