#pragma once

#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_plan.cuh"

// The order in which the attention's blocks take tiles.
namespace winnow::kernels::internal {

inline constexpr int kBuckets = 2048, kBoxKeys = 128;

// A position of a sequence where tiles of all heads begin.
struct TileStart {
  const int32_t* counts;  // of the first head's older survivors, << shift; a valid address anyhow
  int step;               // from a head's count to the next one's
  int shift;              // 31 where there are no such survivors
  int sequence, first;    // first < 0: no tiles
  int band_keys;          // how many of the band they see, at most
};

// Of the tiles at position `first` of the chunk; none from the chunk's end on.
__device__ __forceinline__ TileStart StartOf(const DmsPrefillBatch& b,
                                             const PrefillScratch& scratch,
                                             const DmsPrefillSequence& s, int sequence, int first,
                                             int positions) {
  TileStart start{.counts = scratch.ticket, .shift = 31, .sequence = sequence, .first = -1};
  if (first >= s.num_tokens) return start;
  start.first = first;
  start.band_keys = min(b.window, s.num_prefix + first) + positions;
  const int expired = s.num_prefix + first - b.window;
  if (expired > 0) {
    start.counts = scratch.marks + s.band_row + expired;
    start.step = b.band_rows;
    start.shift = 1;
  } else if (b.num_survivors != nullptr) {
    start.counts = b.num_survivors + int64_t{sequence} * b.num_kv_heads;
    start.step = 1;
    start.shift = 0;
  }
  return start;
}

// Counts all tiles in the buckets of their boxes of keys, longest first; or, where counts are
// places, writes the tiles there. Warps that wait for nobody. Beside blocks that stream a load
// takes long, so the counts of kStarts positions and kAhead heads are under way at once.
template <int kThreads>
__device__ __forceinline__ void SortTiles(const DmsPrefillBatch& b, const PrefillScratch& scratch,
                                          int positions, bool place, int (&counts)[kBuckets]) {
  constexpr int kStarts = 2, kAhead = 4, kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // A warp takes up to 32 positions of a sequence, which lie far apart: neighbours' tiles would
  // wait for each other at one bucket.
  const int shares = (b.max_band + 32 * positions - 1) / (32 * positions);
  for (int share = warp; share < b.batch * shares; share += kStarts * kWarps) {
    DmsPrefillSequence s[kStarts];
    TileStart starts[kStarts];
#pragma unroll
    for (int n = 0; n < kStarts; ++n) {
      s[n] = b.sequences[min((share + n * kWarps) / shares, b.batch - 1)];
    }
#pragma unroll
    for (int n = 0; n < kStarts; ++n) {
      // All of it now, not one field after another where it is used.
      asm volatile("" ::"r"(s[n].num_tokens), "r"(s[n].num_prefix), "r"(s[n].band_row));
      const int sequence = (share + n * kWarps) / shares;
      const int own = share + n * kWarps - sequence * shares;
      const int tiles = (s[n].num_tokens + positions - 1) / positions;  // of a head
      const int apart = (tiles + 31) / 32;
      const bool any = sequence < b.batch && own < apart;
      starts[n] = StartOf(b, scratch, s[n], sequence,
                          any ? (lane * apart + own) * positions : s[n].num_tokens, positions);
    }
    for (int head = 0; head < b.num_kv_heads; head += kAhead) {
      int survivors[kStarts][kAhead];
#pragma unroll
      for (int i = 0; i < kStarts * kAhead; ++i) {
        const TileStart& start = starts[i / kAhead];
        const int other = min(head + i % kAhead, b.num_kv_heads - 1);
        survivors[i / kAhead][i % kAhead] = start.counts[int64_t{other} * start.step];
      }
#pragma unroll
      for (int i = 0; i < kStarts * kAhead; ++i) {
        const TileStart& start = starts[i / kAhead];
        if (start.first < 0 || head + i % kAhead >= b.num_kv_heads) continue;
        const int older = survivors[i / kAhead][i % kAhead] >> start.shift;
        const int boxes = (older + start.band_keys) / kBoxKeys;
        const int at = atomicAdd(&counts[kBuckets - 1 - min(boxes, kBuckets - 1)], 1);
        if (place) {
          scratch.tiles[at] = {.sequence = start.sequence,
                               .head = head + i % kAhead,
                               .first = start.first,
                               .num_survivors = older};
        }
      }
    }
  }
}

// Counts to first places, each thread's run of buckets, then a scan over threads. Returns the
// sum in the last thread.
template <int kThreads>
__device__ __forceinline__ int CountsToPlaces(int (&counts)[kBuckets],
                                              int (&warp_sums)[kThreads / 32]) {
  constexpr int kRun = kBuckets / kThreads;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  int sum = 0;
  for (int i = 0; i < kRun; ++i) sum += counts[kRun * tid + i];
  int inclusive = sum;
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += left;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int place = inclusive - sum;
  for (int i = 0; i < warp; ++i) place += warp_sums[i];
  for (int i = 0; i < kRun; ++i) {
    const int count = counts[kRun * tid + i];
    counts[kRun * tid + i] = place;
    place += count;
  }
  return place;
}

// The tiles, longest first, by a counting sort on the boxes of keys, from the marks. One block
// of kThreads, whose work hides behind the other blocks' of its kernel.
template <int kThreads>
__device__ void Plan(const DmsPrefillBatch& b, const PrefillScratch& scratch, int positions,
                     int (&counts)[kBuckets], int (&warp_sums)[kThreads / 32]) {
  for (int i = threadIdx.x; i < kBuckets; i += kThreads) counts[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    SortTiles<kThreads>(b, scratch, positions, turn == 1, counts);
    if (turn == 1) return;
    __syncthreads();
    const int total = CountsToPlaces<kThreads>(counts, warp_sums);
    if (threadIdx.x == kThreads - 1) *scratch.num_tiles = total;
    __syncthreads();
  }
}

}  // namespace winnow::kernels::internal
