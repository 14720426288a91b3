#pragma once

#include <cstdint>

#include "kernels/cuda/dms_prefill_plan.cuh"
#include "kernels/cuda/ptx.cuh"

// The keys of a tile as one list, in boxes of kBoxKeys columns. What not every row sees
// comes first, so that one box of a tile (more where positions are many) needs the bits
// of its keys, and one, the last, the list's end; the others are not masked:
//
//   old    [0, num_old)              band keys that have left the window of some row
//   new    [new_at, edge_end)        from the first row's own key on: later rows' too
//   middle [edge_end, survivors_at)  band keys that every row sees
//   then                             survivors older than every row's window
//
// Parts start at multiples of 8 columns (the swizzle's period), so the middle is cut to
// one and old takes the rest; the columns between hold some finite rows or zeros.
namespace winnow::kernels::internal {

inline constexpr int kBoxKeys = 128;
// Boxes with old or new keys: at most, of tiles of `positions` positions.
constexpr int MaxEdgeBoxes(int positions) { return (2 * positions + 14 + kBoxKeys - 1) / kBoxKeys; }

enum : int32_t {
  kEndOfTiles = -1,
  kEndOfRun = -2,  // finish what is under way; another record follows
};

// A tile as the block's threads need it.
struct TileWork {
  int32_t head;  // or kEndOfTiles or kEndOfRun
  int32_t num_old, new_at, edge_end, survivors_at, num_keys;
  int32_t slack;          // row p sees old columns from p - slack on by its window
  int32_t band_row;       // of the first old key
  int32_t new_row;        // band row of the first new key
  int32_t compact_row;    // of the first survivor
  int32_t row;            // of the first position in q and out
  int32_t num_positions;  // of the tile
  int32_t careful;        // 1: find the largest score of every box
};

__host__ __device__ constexpr int RoundUpTo8(int x) { return (x + 7) & ~7; }

// Of the columns 2 i + 8 n + {0, 1} of a box, n = 0..15: how many lie below `column` (of
// the box; any integer), at most 32 of them.
__device__ __forceinline__ int OwnColumnsBelow(int column, int i) {
  const int from_mine = max(column - 2 * i, 0);
  return 2 * (from_mine >> 3) + min(from_mine & 7, 2);
}

// The bits [0, n), n >= 0.
__device__ __forceinline__ uint32_t LowBits(int n) {
  uint32_t above;
  asm("shl.b32 %0, %1, %2;" : "=r"(above) : "r"(~0u), "r"(n));  // by 32 or more: 0
  return ~above;
}

// Which of lane i's columns lie below the list's end.
__device__ __forceinline__ uint32_t ColumnsOfList(const TileWork& w, int box, int i) {
  return LowBits(OwnColumnsBelow(w.num_keys - box * kBoxKeys, i));
}

// The list of a tile.
__device__ __forceinline__ TileWork MakeTileWork(const PrefillTile& tile,
                                                 const DmsPrefillSequence& s, int positions,
                                                 int window) {
  const int first = s.num_prefix + tile.first;  // in the band
  const int oldest = max(0, first - window);
  TileWork w{.head = tile.head};
  w.num_positions = min(positions, s.num_tokens - tile.first);
  const int seen_by_all = max(0, first - max(oldest, first + w.num_positions - 1 - window));
  const int middle = seen_by_all & ~7;
  w.num_old = first - oldest - middle;
  w.new_at = RoundUpTo8(w.num_old);
  w.edge_end = w.new_at + RoundUpTo8(w.num_positions);
  w.survivors_at = w.edge_end + middle;
  w.num_keys = w.survivors_at + tile.num_survivors;
  w.slack = max(0, window - first);
  w.band_row = s.band_row + oldest;
  w.new_row = s.band_row + first;
  w.compact_row = s.compact_row;
  w.row = s.row + tile.first;
  return w;
}

// For every edge box b, position p of the tile and lane i of a quad, a word of the
// columns that the lane holds: bit n of seen[b][p][i] says whether the row sees column
// 128 b + 2 i + 8 (n / 2) + n % 2. All lanes of a warp. mark_of(column) is the mark of the
// edge's key there, 0 if there is none. Of below, which gives a lane's columns below one, and
// of those whose keys are kept, edge_of(below, kept) makes what gives the edge's columns that
// position p sees.
template <int kPositions, typename Work, typename MarkOf, typename EdgeOf>
__device__ __forceinline__ void FindSeenBy(const Work& w, MarkOf mark_of, EdgeOf edge_of,
                                           uint32_t (*seen)[kPositions][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, i = lane % 4;
  for (int box = 0; box * kBoxKeys < w.edge_end; ++box) {
    const int first = box * kBoxKeys;
    uint32_t kept = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {  // lane by lane of a quad; here a lane is a column
      const int mark = mark_of(first + 2 * n + 8 * (lane / 2) + lane % 2);
      const uint32_t word = __ballot_sync(~0u, (mark & 1) != 0);
      if (n == i) kept = word;
    }
    const auto below = [=](int column) { return LowBits(OwnColumnsBelow(column - first, i)); };
    const auto edge = edge_of(below, kept);
    const uint32_t rest = below(w.num_keys) & ~below(w.edge_end);
    for (int p = lane / 4; p < w.num_positions; p += 8) seen[box][p][i] = edge(p) | rest;
  }
}

// `marks` are those of the head.
template <int kPositions>
__device__ __forceinline__ void FindSeen(const TileWork& w, const int32_t* marks, int window,
                                         uint32_t (*seen)[kPositions][4]) {
  const auto mark_of = [&](int column) {
    if (column < w.num_old) return marks[w.band_row + column];
    const bool is_new = column >= w.new_at && column < w.new_at + w.num_positions;
    return is_new ? marks[w.new_row + column - w.new_at] : 0;
  };
  const auto edge_of = [&](auto below, uint32_t kept) {
    const uint32_t old = below(w.num_old), not_new = below(w.new_at);
    return [=, &w](int p) {
      const uint32_t in_window = ~below(p - w.slack);
      const uint32_t newer = below(w.new_at + p + 1) & ~not_new;
      return (old & (kept | in_window)) | (newer & (kept | ~below(w.new_at + p - window)));
    };
  };
  FindSeenBy<kPositions>(w, mark_of, edge_of, seen);
}

}  // namespace winnow::kernels::internal
