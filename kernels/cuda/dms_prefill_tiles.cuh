#pragma once

#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_plan.cuh"

// The order in which the attention's blocks take tiles.
namespace winnow::kernels::internal {

inline constexpr int kBuckets = 2048, kBoxKeys = 128;

// The tiles, longest first, by a counting sort on the boxes of keys, from the marks. One block
// of kThreads, whose work hides behind the other blocks' of its kernel.
template <int kThreads>
__device__ void Plan(const DmsPrefillBatch& b, const PrefillScratch& scratch, int positions,
                     int (&counts)[kBuckets], int (&warp_sums)[kThreads / 32]) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  for (int i = tid; i < kBuckets; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int turn = 0; turn < 2; ++turn) {  // count, then place
    for (int sequence = 0; sequence < b.batch; ++sequence) {
      const DmsPrefillSequence s = b.sequences[sequence];
      const int tiles = (s.num_tokens + positions - 1) / positions * b.num_kv_heads;
      for (int i = tid; i < tiles; i += kThreads) {
        PrefillTile tile{.sequence = sequence,
                         .head = i % b.num_kv_heads,
                         .first = i / b.num_kv_heads * positions};
        const int expired = s.num_prefix + tile.first - b.window;
        if (expired > 0) {
          tile.num_survivors =
              scratch.marks[int64_t{tile.head} * b.band_rows + s.band_row + expired] >> 1;
        } else if (b.num_survivors != nullptr) {
          tile.num_survivors = b.num_survivors[sequence * b.num_kv_heads + tile.head];
        } else {
          tile.num_survivors = 0;
        }
        const int keys = tile.num_survivors + min(b.window, s.num_prefix + tile.first) + positions;
        const int bucket = kBuckets - 1 - min(keys / kBoxKeys, kBuckets - 1);
        const int at = atomicAdd(&counts[bucket], 1);
        if (turn == 1) scratch.tiles[at] = tile;
      }
    }
    __syncthreads();
    if (turn == 1) break;
    // Counts to first places: each thread's run of buckets, then a scan over threads.
    constexpr int kRun = kBuckets / kThreads;
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
    if (tid == kThreads - 1) *scratch.num_tiles = place + sum;
    for (int i = 0; i < kRun; ++i) {
      const int count = counts[kRun * tid + i];
      counts[kRun * tid + i] = place;
      place += count;
    }
    __syncthreads();
  }
}

}  // namespace winnow::kernels::internal
