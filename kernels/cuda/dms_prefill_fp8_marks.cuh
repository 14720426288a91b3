#pragma once

#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_plan.cuh"

// The scan of the keep bits, to the same marks as dms_prefill_compact.cu's.
namespace winnow::kernels::internal {

// Marks: one block a (KV head, sequence) scans the band's keep bits. Grid
// (num_kv_heads, batch), kScanThreads threads of kScanTokens tokens each and turn.

inline constexpr int kScanThreads = 1024, kScanTokens = 8;

// The bit of band token `i` of a band of `band`, 1: evict.
inline __device__ bool Evicted(const DmsPrefillCompactParams& p, const DmsPrefillSequence& s,
                               int head, int i, int band) {
  const int own = i + p.batch.shift;  // the token whose decision it is
  if (own < s.num_prefix) {
    return p.prefix_evict != nullptr &&
           p.prefix_evict[int64_t{s.band_row + i} * p.batch.num_kv_heads + head] != 0;
  }
  if (own >= band || p.decisions == nullptr) return false;
  return p.decisions[int64_t{s.row + own - s.num_prefix} * p.batch.num_kv_heads + head] != 0;
}

// Writes the band's marks of one KV head; `before` survivors are older than the band.
// Returns how many survivors will be laid out, those included. All kScanThreads threads
// of a block; the first block also sets the ticket to 0.
inline __device__ int MarkBand(const DmsPrefillCompactParams& p, const PrefillScratch& scratch,
                               const DmsPrefillSequence& s, int head, int before) {
  __shared__ int warp_sums[kScanThreads / 32];
  __shared__ int expired;
  const DmsPrefillBatch& b = p.batch;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int band = s.num_prefix + s.num_tokens, expirable = NumExpirable(band, b.window);
  if (threadIdx.x == 0) expired = before;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *scratch.ticket = 0;
  int32_t* marks = scratch.marks + int64_t{head} * b.band_rows + s.band_row;
  static_assert(kScanThreads == 32 * 32);
  for (int base = 0; base < band; base += kScanThreads * kScanTokens) {
    const int first = base + static_cast<int>(threadIdx.x) * kScanTokens;
    int keep[kScanTokens], sum = 0;
#pragma unroll
    for (int i = 0; i < kScanTokens; ++i) {
      keep[i] = first + i < band && !Evicted(p, s, head, first + i, band) ? 1 : 0;
      sum += keep[i];
    }
    int inclusive = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, inclusive, step);
      if (lane >= step) inclusive += left;
    }
    __syncthreads();  // the last turn's sums are read
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    // Every warp scans the 32 warps' sums for itself.
    int warps = warp_sums[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, warps, step);
      if (lane >= step) warps += left;
    }
    const int total = __shfl_sync(~0u, warps, 31);
    const int up_to_mine = __shfl_sync(~0u, warps, warp);
    const int own = __shfl_sync(~0u, inclusive, 31);
    int rank = before + up_to_mine - own + inclusive - sum;
#pragma unroll
    for (int i = 0; i < kScanTokens; ++i) {
      if (first + i < band) marks[first + i] = 2 * rank + keep[i];
      rank += keep[i];
      if (first + i + 1 == expirable) expired = rank;
    }
    before += total;
  }
  __syncthreads();
  return expired;
}

}  // namespace winnow::kernels::internal
