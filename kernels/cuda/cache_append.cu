#include <cuda_runtime.h>

#include <algorithm>

#include "common/cuda/cuda_status.h"
#include "kernels/cuda/dms_prefill_plan.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/layer_spans.cuh"
#include "kernels/cuda/page_pool.cuh"
#include "kernels/cuda/prefix_cache.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/span_token.cuh"

namespace winnow::kernels {
namespace {

using device::CopyToken;
using device::Place;
using device::TokenShape;
using internal::LayerSpans;
using internal::PrefillScratch;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

// A span's line: ring, newest and chunk in order of age; token i of it is token i of the
// batch's band. All but the last enter the ring; of those the first `num_out` leave it again,
// so that the last `window` stay.
struct Line {
  int length, num_prefix, num_out;
  int num_ring;          // before
  const int32_t* marks;  // [length]: 2 * (survivor slot it has if kept) + (it is kept)
};

__device__ Line LineOf(const DmsPrefillBatch& b, const PrefillScratch& scratch,
                       const DmsPrefillSequence& s, int g, int window) {
  const int length = s.num_prefix + s.num_tokens;
  return {.length = length,
          .num_prefix = s.num_prefix,
          .num_out = max(length - 1 - window, 0),
          .num_ring = max(s.num_prefix - 1, 0),
          .marks = scratch.marks + int64_t{g} * b.band_rows + s.band_row};
}

// Pages and counters. Grid (KV heads, batch): a block a span.
__global__ void __launch_bounds__(kThreads)
    AppendPagesKernel(const __grid_constant__ CacheAppendParams p, const LayerSpans spans,
                      const PrefillScratch scratch, int slots) {
  __shared__ int first_taken;
  ptx::WaitForPredecessors();
  ptx::LetDependentsStart();
  const DmsPrefillBatch& b = p.batch;
  const int sequence = static_cast<int>(blockIdx.y), g = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const DmsPrefillSequence s = b.sequences[sequence];
  const int slot_of_cache = p.slots[sequence];
  if (slot_of_cache < 0 || s.num_tokens == 0) return;
  const int64_t span = int64_t{slot_of_cache} * b.num_kv_heads + g;
  const Line line = LineOf(b, scratch, s, g, spans.window);
  const SpanState before = spans.state[span];
  SpanState state = before;
  state.num_tokens += s.num_tokens;
  state.num_ring = min(spans.window, line.length - 1);
  if (line.num_out > 0) {
    state.num_survivors = line.marks[line.num_out] >> 1;
    if (spans.window > 0) state.ring_start = (before.ring_start + line.num_out) % spans.window;
  }
  const auto pages = [slots](int tokens) { return (tokens + slots - 1) / slots; };
  const int first_survivor = pages(before.num_survivors), first_ring = pages(before.num_ring);
  const int num_survivors = pages(state.num_survivors) - first_survivor;
  const int wanted = num_survivors + pages(state.num_ring) - first_ring;
  if (thread == 0) {
    int first = 0;
    if (wanted > 0 && (pages(state.num_survivors) > spans.max_survivor_pages ||
                       device::TakePages(p.pool.num_free, wanted, wanted, &first) == 0)) {
      first = -1;
      *p.pool.exhausted = 1;
    }
    first_taken = first;
  }
  __syncthreads();  // all have read the state
  const int first = first_taken;
  if (first < 0) return;
#pragma unroll 4
  for (int i = thread; i < wanted; i += kThreads) {
    int32_t* to =
        i < num_survivors
            ? spans.survivor_pages + span * spans.max_survivor_pages + first_survivor + i
            : spans.ring_pages + span * spans.ring_pages_per_span + first_ring + i - num_survivors;
    *to = p.pool.free_pages[first + i];
  }
  if (thread == 0) spans.state[span] = state;
}

// The tokens, eight lanes a token. Who writes a place has read before what lay there: a token
// that stays moves the one whose ring slot it gets, the newest of before makes room for the
// newest. Grid (pieces, batch, KV heads): the first pieces have the tokens that stay, one for
// each eight lanes, and the newest; in the others a warp looks at 32 that leave again.
template <KvElement kElement, int kDim>
__global__ void __launch_bounds__(kThreads)
    AppendTokensKernel(const __grid_constant__ CacheAppendParams p, const LayerSpans spans,
                       const PrefillScratch scratch) {
  using T = TokenShape<kElement, kDim>;
  constexpr int kTokenBytes = 2 * T::kRowBytes + (T::kScaled ? 4 : 0);
  ptx::WaitForPredecessors();
  const DmsPrefillBatch& b = p.batch;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int sequence = static_cast<int>(blockIdx.y), g = static_cast<int>(blockIdx.z);
  const DmsPrefillSequence s = b.sequences[sequence];
  const int slot_of_cache = p.slots[sequence];
  const int window = spans.window;
  const Line line = LineOf(b, scratch, s, g, window);
  if (slot_of_cache < 0 || s.num_tokens == 0) return;
  const int64_t span = int64_t{slot_of_cache} * b.num_kv_heads + g;
  const SpanState state = spans.state[span];  // after the chunk
  if (state.num_ring != min(window, line.length - 1) ||
      (line.num_out > 0 && state.num_survivors != line.marks[line.num_out] >> 1)) {
    return;  // there were no pages for it
  }
  const int ring_start =
      window == 0 ? 0 : (state.ring_start - line.num_out % window + window) % window;
  uint8_t* newest = spans.newest + span * spans.newest_stride;
  uint8_t* flags = spans.ring_evict + span * spans.evict_stride();
  const int in_eight = lane % 8;
  const auto survivor = [&](int slot) {
    const int page = spans.survivor_pages[span * spans.max_survivor_pages + slot / T::kSlots];
    return Place{spans.pages + int64_t{page} * T::kPageBytes, T::kSlots, slot % T::kSlots};
  };
  const auto chunk_row = [&](int token) {
    const int64_t row = int64_t{s.row + token} * b.num_kv_heads + g;
    return Place{const_cast<uint8_t*>(p.rows) + row * kTokenBytes, 1, 0};
  };
  // Token i of the line, from outside the ring, to where it stays.
  const auto move = [&](int i, int mark, const Place& from) {
    if (i < line.num_out) {
      if ((mark & 1) != 0) CopyToken<T, 8>(from, survivor(mark >> 1), in_eight);
      return;
    }
    const int slot = (ring_start + i) % window;
    const int page = spans.ring_pages[span * spans.ring_pages_per_span + slot / T::kSlots];
    const Place to{spans.pages + int64_t{page} * T::kPageBytes, T::kSlots, slot % T::kSlots};
    const int left = i % window;  // of the line: who had this slot, if anybody
    const int mark_left = left < line.num_ring ? line.marks[left] : 0;
    if ((mark_left & 1) != 0) CopyToken<T, 8>(to, survivor(mark_left >> 1), in_eight);
    CopyToken<T, 8>(from, to, in_eight);
    if (in_eight == 0) flags[slot] = (mark & 1) == 0 ? 1 : 0;
  };
  const int had_newest = s.num_prefix > 0 ? 1 : 0;
  const int first_new = line.num_ring + had_newest;  // the chunk's first
  const int stay_pieces = (window + 1 + kWarps * 4 - 1) / (kWarps * 4);
  if (static_cast<int>(blockIdx.x) < stay_pieces) {
    const int n = static_cast<int>(blockIdx.x) * kWarps * 4 + warp * 4 + lane / 8;
    if (n > 0) {
      const int i = max(line.num_out, first_new) + n - 1;
      if (i + 1 < line.length) move(i, line.marks[i], chunk_row(i - s.num_prefix));
      return;
    }
    if (had_newest == 1) {
      move(line.num_ring, line.marks[line.num_ring], Place{newest, 1, 0});
    }
    CopyToken<T, 8>(chunk_row(s.num_tokens - 1), Place{newest, 1, 0}, in_eight);
    if (in_eight == 0 && window > 0) {
      flags[window] = (line.marks[line.length - 1] & 1) == 0 ? 1 : 0;
    }
    return;
  }
  const int first = first_new + ((static_cast<int>(blockIdx.x) - stay_pieces) * kWarps + warp) * 32;
  const int own_mark = first + lane < line.num_out ? line.marks[first + lane] : 0;
  uint32_t kept = __ballot_sync(kAll, (own_mark & 1) != 0);
  while (kept != 0) {
    uint32_t mine = kept;  // without as many as lanes of eight come before
    for (int n = 0; n < 4; ++n) {
      if (n < lane / 8) mine &= mine - 1;
      kept &= kept - 1;
    }
    const int offset = __ffs(static_cast<int>(mine)) - 1;
    const int mark = __shfl_sync(kAll, own_mark, max(offset, 0));
    if (offset < 0) continue;
    CopyToken<T, 8>(chunk_row(first + offset - s.num_prefix), survivor(mark >> 1), in_eight);
  }
}

template <KvElement kElement, int kDim>
absl::Status EnqueueTokens(const CacheAppendParams& p, const LayerSpans& spans,
                           const PrefillScratch& scratch, cudaStream_t stream) {
  const DmsPrefillBatch& b = p.batch;
  constexpr int kStayers = kWarps * 4;
  const int pieces = (spans.window + 1 + kStayers - 1) / kStayers +
                     (std::max(b.max_band - 1 - spans.window, 0) + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(pieces), static_cast<unsigned>(b.batch),
                  static_cast<unsigned>(b.num_kv_heads));
  return LaunchEarly(AppendTokensKernel<kElement, kDim>, grid, kThreads, 0, stream, p, spans,
                     scratch);
}

}  // namespace

absl::Status ValidateCacheAppend(const CacheAppendParams& p) {
  WINNOW_RETURN_IF_ERROR(
      internal::ValidateLayer("cache_append", p.batch, p.spans, p.slots, p.layer));
  if (p.pool.free_pages == nullptr || p.pool.num_free == nullptr || p.pool.exhausted == nullptr) {
    return absl::InvalidArgumentError("cache_append: a pointer of pool is null");
  }
  if (p.rows == nullptr || !Aligned(p.rows, 4)) {
    return absl::InvalidArgumentError("cache_append: rows is null or misaligned");
  }
  return absl::OkStatus();
}

absl::Status LaunchCacheAppend(const CacheAppendParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateCacheAppend(params));
  const DmsPrefillBatch& b = params.batch;
  if (b.batch == 0 || b.max_band == 0) return absl::OkStatus();
  const LayerSpans spans = internal::LayerOf(params.spans, params.layer);
  const PrefillScratch scratch = internal::ScratchOf(b);
  const dim3 grid(static_cast<unsigned>(b.num_kv_heads), static_cast<unsigned>(b.batch));
  WINNOW_RETURN_IF_ERROR(LaunchEarly(AppendPagesKernel, grid, kThreads, 0, stream, params, spans,
                                     scratch, params.spans.slots_per_page()));
  const bool bf16 = params.spans.format == KvFormatId::kBf16;
  if (b.head_dim == 64) {
    return bf16 ? EnqueueTokens<KvElement::kBf16, 64>(params, spans, scratch, stream)
                : EnqueueTokens<KvElement::kE4m3, 64>(params, spans, scratch, stream);
  }
  return bf16 ? EnqueueTokens<KvElement::kBf16, 128>(params, spans, scratch, stream)
              : EnqueueTokens<KvElement::kE4m3, 128>(params, spans, scratch, stream);
}

}  // namespace winnow::kernels
