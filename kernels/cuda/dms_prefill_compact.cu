#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_plan.cuh"
#include "kernels/cuda/dms_prefill_store.cuh"
#include "kernels/cuda/dms_prefill_tiles.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace winnow::kernels {
namespace {

using internal::Four;
using internal::kBuckets;
using internal::NumExpirable;
using internal::PrefillScratch;
using internal::StoreVector;

// ---------------------------------------------------------------------------
// Marks: a block a piece of a (KV head, sequence) counts the kept tokens before its piece,
// then scans its own. Grid (num_kv_heads, batch, pieces of the longest band).

constexpr int kMarkWarps = 16, kMarkThreads = 32 * kMarkWarps;
constexpr int kMarkWords = 8;  // of 32 tokens, a warp
constexpr int kMarkTokens = kMarkThreads * kMarkWords;

// Whether band token `i`, any of [0, band + 31], is one that is kept. One load at most
// and no branch before it, so that many are under way at a time.
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

// Zeros in rows [first, first + 8) of x, but none from `end` on. All threads.
__device__ void ZeroRows(Bf16* x, int64_t row_stride, int first, int end, int head_dim) {
  const int n = min(8, end - first) * head_dim;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    x[(first + i / head_dim) * row_stride + i % head_dim] = Bf16{0};
  }
}

// The sum over the block of every warp's `x`, which is the same in all its lanes, and that
// over the warps before this one.
__device__ int2 SumOfWarps(int x, int (&shared)[kMarkWarps]) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  __syncthreads();  // what was there is read
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  int2 sums = make_int2(0, 0);
#pragma unroll
  for (int i = 0; i < kMarkWarps; ++i) {
    sums.x += shared[i];
    sums.y += i < warp ? shared[i] : 0;
  }
  return sums;
}

__global__ void __launch_bounds__(kMarkThreads)
    MarkKernel(const DmsPrefillCompactParams p, const PrefillScratch scratch) {
  __shared__ int sums[kMarkWarps];
  __shared__ int expired;
  ptx::WaitForPredecessors();
  ptx::LetDependentsStart();
  const DmsPrefillBatch& b = p.batch;
  const int head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int band = s.num_prefix + s.num_tokens, expirable = NumExpirable(band, b.window);
  const int start = static_cast<int>(blockIdx.z) * kMarkTokens;
  if (start >= band && start > 0) return;
  if (blockIdx.x == 0 && blockIdx.y == 0 && start == 0 && threadIdx.x == 0) *scratch.ticket = 0;
  const auto kept = [&](int i) { return Kept(p, s, head, i, band); };
  const int older =
      b.num_survivors == nullptr ? 0 : b.num_survivors[blockIdx.y * b.num_kv_heads + head];
  int before = 0;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < start; i += kMarkThreads) before += kept(i);
  before = older + SumOfWarps(__reduce_add_sync(~0u, before), sums).x;

  const int first = start + warp * 32 * kMarkWords;
  uint32_t words[kMarkWords];
  int count = 0;
#pragma unroll
  for (int n = 0; n < kMarkWords; ++n) {
    words[n] = __ballot_sync(~0u, kept(first + 32 * n + lane));
    count += __popc(words[n]);
  }
  const int2 counts = SumOfWarps(count, sums);
  // Survivors of the band end where the last expirable token lies; one block has it.
  const bool last = expirable > start && expirable <= start + kMarkTokens;
  const bool none = expirable == 0 && start == 0;
  if (none && threadIdx.x == 0) expired = older;
  int32_t* marks = scratch.marks + int64_t{head} * b.band_rows + s.band_row;
  int rank = before + counts.y;
#pragma unroll
  for (int n = 0; n < kMarkWords; ++n) {
    const int i = first + 32 * n + lane;
    const int own = static_cast<int>(words[n] >> lane & 1);
    const int mine = rank + __popc(words[n] & ((1u << lane) - 1));
    if (i < band) marks[i] = 2 * mine + own;
    if (i + 1 == expirable) expired = mine + own;
    rank += __popc(words[n]);
  }
  if (!last && !none) return;
  __syncthreads();
  const int64_t compact = (int64_t{head} * b.compact_rows) * b.head_dim;
  ZeroRows(b.compact_k + compact, b.head_dim, s.compact_row + expired, b.compact_rows, b.head_dim);
  ZeroRows(b.compact_v + compact, b.head_dim, s.compact_row + expired, b.compact_rows, b.head_dim);
  const int64_t stride = int64_t{b.num_kv_heads} * b.head_dim;
  const int end = s.band_row + band;
  ZeroRows(b.band_k + head * b.head_dim, stride, end, b.band_rows, b.head_dim);
  ZeroRows(b.band_v + head * b.head_dim, stride, end, b.band_rows, b.head_dim);
}

// ---------------------------------------------------------------------------
// Store: four lanes a K or V of one token and head, a warp four such rows of
// [tokens, heads]. Grid (1 + pieces of the longest band, batch); the
// first block plans. All but the place of a survivor is done before the marks are there.
// Shared memory: the partial sums, the flat rows on their way out, and the plan's counts.

constexpr int kStoreWarps = 8, kStoreThreads = 32 * kStoreWarps;
constexpr int kItems = 4;  // tokens of a head, a warp

template <int kDim, KvElement kK, KvElement kV>
__global__ void __launch_bounds__(kStoreThreads)
    StoreKernel(const DmsPrefillCompactParams p, const PrefillScratch scratch, int positions) {
  constexpr int kN = kDim / 16;
  constexpr int kKBytes = kDim * static_cast<int>(KvElementBytes(kK));
  constexpr int kVBytes = kDim * static_cast<int>(KvElementBytes(kV));
  constexpr int kScaleAt = kKBytes + kVBytes;
  constexpr int kTokenBytes =
      kScaleAt + static_cast<int>(KvScaleBytes(kK)) + static_cast<int>(KvScaleBytes(kV));
  static_assert(kTokenBytes % 4 == 0);
  union Shared {
    struct {
      alignas(16) float sums[kStoreWarps][8][32];
      alignas(16) uint8_t staged[kStoreWarps][kItems][kTokenBytes];
    } store;
    struct {
      int counts[kBuckets];
      int warp_sums[kStoreWarps];
    } plan;
  };
  __shared__ Shared shared;
  const DmsPrefillBatch& b = p.batch;
  ptx::LetDependentsStart();
  if (blockIdx.x == 0) {
    ptx::WaitForPredecessors();
    if (blockIdx.y == 0)
      internal::Plan<kStoreThreads>(b, scratch, positions, shared.plan.counts,
                                    shared.plan.warp_sums);
    return;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int band = s.num_prefix + s.num_tokens;
  const int first = kItems * (static_cast<int>(blockIdx.x - 1) * kStoreWarps + warp);
  const int in_warp = lane / 8, is_v = lane / 4 % 2;
  const int item = first + in_warp;  // of [band, num_kv_heads]
  const int i = item / b.num_kv_heads, head = item - i * b.num_kv_heads;
  const Four four{.lane = lane % 4, .mask = 0xfu << (lane & ~3)};
  uint8_t* row = shared.store.staged[warp][in_warp];
  const bool fresh = i < band && i >= s.num_prefix;
  uint2 packed[kN];
  const int64_t band_at = (int64_t{s.band_row + i} * b.num_kv_heads + head) * kDim + 4 * four.lane;
  Bf16* band_out = (is_v ? b.band_v : b.band_k) + band_at;
  if (i < band) {
    const Bf16* in = fresh ? (is_v ? p.v : p.k) + (s.row + i - s.num_prefix) * p.kv_stride +
                                 head * kDim + 4 * four.lane
                           : band_out;
#pragma unroll
    for (int n = 0; n < kN; ++n) packed[n] = *reinterpret_cast<const uint2*>(in + 16 * n);
  }
  if (fresh) {
    float4 x[kN];
    uint32_t amax = 0;  // of the upper and of the lower halves
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      amax = __vmaxu2(amax, __vmaxu2(packed[n].x & 0x7fff7fff, packed[n].y & 0x7fff7fff));
      x[n] = make_float4(
          __uint_as_float(packed[n].x << 16), __uint_as_float(packed[n].x & 0xffff0000u),
          __uint_as_float(packed[n].y << 16), __uint_as_float(packed[n].y & 0xffff0000u));
    }
    amax = internal::MaxOfFour(max(amax & 0xffff0000u, amax << 16), four);
    float* own_sums = shared.store.sums[warp][lane / 4];
    uint8_t* codes = is_v ? row + kKBytes : row;
    uint8_t* scale = row + kScaleAt + (is_v ? static_cast<int>(KvScaleBytes(kK)) : 0);
    if (kK == kV || !is_v) {  // one path for all lanes if the elements are of one kind
      StoreVector<kK>(x, amax, four, own_sums, codes, scale);
    } else {
      StoreVector<kV>(x, amax, four, own_sums, codes, scale);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      packed[n] = make_uint2(ptx::PackBf16(x[n].x, x[n].y), ptx::PackBf16(x[n].z, x[n].w));
      *reinterpret_cast<uint2*>(band_out + 16 * n) = packed[n];
    }
  }
  if (p.rows != nullptr) {
    __syncwarp();
    // The warp's rows of the chunk are side by side: [from, to) of its words.
    constexpr int kWords = kTokenBytes / 4;
    const int chunk_item = first - s.num_prefix * b.num_kv_heads;  // of [num_tokens, num_kv_heads]
    const int from = kWords * max(0, min(kItems, -chunk_item));
    const int to = kWords * max(0, min(kItems, s.num_tokens * b.num_kv_heads - chunk_item));
    auto* out = reinterpret_cast<uint32_t*>(
        p.rows + (int64_t{s.row} * b.num_kv_heads + chunk_item) * kTokenBytes);
    const auto* staged = reinterpret_cast<const uint32_t*>(shared.store.staged[warp][0]);
#pragma unroll
    for (int word = lane; word < kItems * kWords; word += 32) {
      if (word >= from && word < to) out[word] = staged[word];
    }
  }
  if (i >= NumExpirable(band, b.window)) return;
  ptx::WaitForPredecessors();
  const int mark = scratch.marks[int64_t{head} * b.band_rows + s.band_row + i];
  if ((mark & 1) == 0) return;
  Bf16* out = (is_v ? b.compact_v : b.compact_k) +
              (int64_t{head} * b.compact_rows + s.compact_row + (mark >> 1)) * kDim + 4 * four.lane;
#pragma unroll
  for (int n = 0; n < kN; ++n) *reinterpret_cast<uint2*>(out + 16 * n) = packed[n];
}

template <int kDim, KvElement kK, KvElement kV>
absl::Status EnqueueStore(const DmsPrefillCompactParams& p, const PrefillScratch& scratch,
                          StreamHandle stream) {
  const int64_t items = int64_t{p.batch.max_band} * p.batch.num_kv_heads;
  constexpr int kBlockItems = kItems * kStoreWarps;
  const dim3 grid(static_cast<unsigned>(1 + (items + kBlockItems - 1) / kBlockItems),
                  static_cast<unsigned>(p.batch.batch));
  return LaunchEarly(StoreKernel<kDim, kK, kV>, grid, kStoreThreads, 0, stream, p, scratch,
                     internal::TilePositions(kDim, p.batch.group));
}

// ---------------------------------------------------------------------------
// Lay out: the band is stored already; a warp copies the survivors among 32 band tokens of
// a head, half a warp K, half V. Grid (1 + pieces of the longest band, batch, num_kv_heads);
// the first block plans, with more threads as there is less to hide behind.

constexpr int kLayOutThreads = 1024;

template <int kDim>
__global__ void __launch_bounds__(kLayOutThreads)
    LayOutKernel(const DmsPrefillBatch b, const PrefillScratch scratch, int positions) {
  __shared__ int counts[kBuckets];
  __shared__ int warp_sums[kLayOutThreads / 32];
  ptx::LetDependentsStart();
  ptx::WaitForPredecessors();
  if (blockIdx.x == 0) {
    if (blockIdx.y == 0 && blockIdx.z == 0)
      internal::Plan<kLayOutThreads>(b, scratch, positions, counts, warp_sums);
    return;
  }
  using Lane = std::conditional_t<kDim == 128, uint4, uint2>;  // a vector is 16 of them
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.z;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int first = (static_cast<int>(blockIdx.x - 1) * (kLayOutThreads / 32) + warp) * 32;
  const int expirable = NumExpirable(s.num_prefix + s.num_tokens, b.window);
  if (first >= expirable) return;
  const int mark = first + lane < expirable
                       ? scratch.marks[int64_t{head} * b.band_rows + s.band_row + first + lane]
                       : 0;
  const bool is_v = lane >= 16;
  const Bf16* from =
      (is_v ? b.band_v : b.band_k) + (int64_t{s.band_row + first} * b.num_kv_heads + head) * kDim;
  Bf16* to =
      (is_v ? b.compact_v : b.compact_k) + (int64_t{head} * b.compact_rows + s.compact_row) * kDim;
  for (uint32_t kept = __ballot_sync(~0u, (mark & 1) != 0); kept != 0; kept &= kept - 1) {
    const int i = __ffs(static_cast<int>(kept)) - 1;
    const int rank = __shfl_sync(~0u, mark, i) >> 1;
    reinterpret_cast<Lane*>(to + int64_t{rank} * kDim)[lane % 16] =
        reinterpret_cast<const Lane*>(from + int64_t{i} * b.num_kv_heads * kDim)[lane % 16];
  }
}

template <int kDim>
absl::Status EnqueueLayOut(const DmsPrefillBatch& b, const PrefillScratch& scratch,
                           StreamHandle stream) {
  const int expirable = NumExpirable(b.max_band, b.window);
  const dim3 grid(1 + static_cast<unsigned>((expirable + kLayOutThreads - 1) / kLayOutThreads),
                  static_cast<unsigned>(b.batch), static_cast<unsigned>(b.num_kv_heads));
  return LaunchEarly(LayOutKernel<kDim>, grid, kLayOutThreads, 0, stream, b, scratch,
                     internal::TilePositions(kDim, b.group));
}

template <int kDim>
absl::Status EnqueueStore(const DmsPrefillCompactParams& p, const PrefillScratch& scratch,
                          StreamHandle stream) {
  switch (p.format) {
    case KvFormatId::kBf16:
      return EnqueueStore<kDim, KvElement::kBf16, KvElement::kBf16>(p, scratch, stream);
    case KvFormatId::kFp8:
      return EnqueueStore<kDim, KvElement::kE4m3, KvElement::kE4m3>(p, scratch, stream);
    case KvFormatId::kInt8:
    case KvFormatId::kInt8H:
      return EnqueueStore<kDim, KvElement::kInt8, KvElement::kInt8>(p, scratch, stream);
    case KvFormatId::kK8V8:
      return EnqueueStore<kDim, KvElement::kInt8, KvElement::kE4m3>(p, scratch, stream);
  }
  return absl::InternalError("dms_prefill: unknown format");
}

}  // namespace

absl::Status LaunchDmsPrefillCompact(const DmsPrefillCompactParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillCompact(params));
  const DmsPrefillBatch& b = params.batch;
  if (b.batch == 0) return absl::OkStatus();
  const PrefillScratch scratch = internal::ScratchOf(b);
  const int pieces = std::max(1, (b.max_band + kMarkTokens - 1) / kMarkTokens);
  const dim3 grid(static_cast<unsigned>(b.num_kv_heads), static_cast<unsigned>(b.batch),
                  static_cast<unsigned>(pieces));
  WINNOW_RETURN_IF_ERROR(LaunchEarly(MarkKernel, grid, kMarkThreads, 0, stream, params, scratch));
  if (params.k == nullptr) {
    return b.head_dim == 64 ? EnqueueLayOut<64>(b, scratch, stream)
                            : EnqueueLayOut<128>(b, scratch, stream);
  }
  return b.head_dim == 64 ? EnqueueStore<64>(params, scratch, stream)
                          : EnqueueStore<128>(params, scratch, stream);
}

}  // namespace winnow::kernels
