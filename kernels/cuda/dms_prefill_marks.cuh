#pragma once

#include <algorithm>

#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_plan.cuh"

// The marks of the keep bits: a block a piece of a (KV head, sequence) counts the kept tokens
// before its piece, then scans its own.
namespace winnow::kernels::internal {

inline constexpr int kMarkWarps = 32, kMarkThreads = 32 * kMarkWarps;
inline constexpr int kMarkWords = 4;  // of 32 tokens, a warp
inline constexpr int kMarkTokens = kMarkThreads * kMarkWords;

// (num_kv_heads, batch, pieces of the longest band)
inline dim3 MarkGrid(const DmsPrefillBatch& b) {
  const int pieces = std::max(1, (b.max_band + kMarkTokens - 1) / kMarkTokens);
  return dim3(static_cast<unsigned>(b.num_kv_heads), static_cast<unsigned>(b.batch),
              static_cast<unsigned>(pieces));
}

// Whether band token `i`, from 0 on and perhaps past the band, is one that is kept. One load at
// most and no branch before it, so that many are under way at a time.
__device__ __forceinline__ bool Kept(const DmsPrefillCompactParams& p, const DmsPrefillSequence& s,
                                     int head, int i, int band) {
  const int own = i + p.batch.shift;  // the token whose decision it is
  const bool prefix = own < s.num_prefix;
  const uint8_t* bits = prefix ? p.prefix_evict : p.decisions;
  const int64_t row = prefix ? int64_t{s.band_row} + i : int64_t{s.row} + own - s.num_prefix;
  uint8_t evict = 0;
  if (bits != nullptr && own < band) evict = bits[row * p.batch.num_kv_heads + head];
  return i < band && evict == 0;
}

// Writes the marks of the block's piece; `s` is its sequence. All kMarkThreads threads; the
// first block also sets the ticket to 0. In one block of a head and sequence returns how many
// of its survivors will be laid out, older ones included; -1 in the others.
__device__ __forceinline__ int MarkPiece(const DmsPrefillCompactParams& p,
                                         const PrefillScratch& scratch,
                                         const DmsPrefillSequence& s) {
  __shared__ int2 sums[kMarkWarps];
  __shared__ int expired;
  const DmsPrefillBatch& b = p.batch;
  const int head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int band = s.num_prefix + s.num_tokens, expirable = NumExpirable(band, b.window);
  const int start = static_cast<int>(blockIdx.z) * kMarkTokens;
  if (start >= band && start > 0) return -1;
  if (blockIdx.x == 0 && blockIdx.y == 0 && start == 0 && threadIdx.x == 0) *scratch.ticket = 0;
  const auto kept = [&](int i) { return Kept(p, s, head, i, band); };
  const int older =
      b.num_survivors == nullptr ? 0 : b.num_survivors[blockIdx.y * b.num_kv_heads + head];
  // All loads are under way before any is waited for.
  const int first = start + warp * 32 * kMarkWords;
  bool own_kept[kMarkWords];
#pragma unroll
  for (int n = 0; n < kMarkWords; ++n) own_kept[n] = kept(first + 32 * n + lane);
  int before = 0;
#pragma unroll 16
  for (int i = static_cast<int>(threadIdx.x); i < start; i += kMarkThreads) before += kept(i);
  uint32_t words[kMarkWords];
  int count = 0;
#pragma unroll
  for (int n = 0; n < kMarkWords; ++n) {
    words[n] = __ballot_sync(~0u, own_kept[n]);
    count += __popc(words[n]);
  }
  before = __reduce_add_sync(~0u, before);
  if (lane == 0) sums[warp] = make_int2(before, count);
  __syncthreads();
  static_assert(kMarkWarps == 32);
  int rank = older + __reduce_add_sync(~0u, sums[lane].x) +
             __reduce_add_sync(~0u, lane < warp ? sums[lane].y : 0);
  // Survivors of the band end where the last expirable token lies; one block has it.
  const bool last = expirable > start && expirable <= start + kMarkTokens;
  const bool none = expirable == 0 && start == 0;
  if (none && threadIdx.x == 0) expired = older;
  int32_t* marks = scratch.marks + int64_t{head} * b.band_rows + s.band_row;
#pragma unroll
  for (int n = 0; n < kMarkWords; ++n) {
    const int i = first + 32 * n + lane;
    const int own = static_cast<int>(words[n] >> lane & 1);
    const int mine = rank + __popc(words[n] & ((1u << lane) - 1));
    if (i < band) marks[i] = 2 * mine + own;
    if (i + 1 == expirable) expired = mine + own;
    rank += __popc(words[n]);
  }
  if (!last && !none) return -1;
  __syncthreads();
  return expired;
}

}  // namespace winnow::kernels::internal
