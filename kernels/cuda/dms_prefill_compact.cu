#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_marks.cuh"
#include "kernels/cuda/dms_prefill_plan.cuh"
#include "kernels/cuda/dms_prefill_store.cuh"
#include "kernels/cuda/dms_prefill_tiles.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace winnow::kernels {
namespace {

using internal::kBuckets;
using internal::kMarkThreads;
using internal::NumExpirable;
using internal::PrefillScratch;

// ---------------------------------------------------------------------------
// Marks, by a block a piece of a (KV head, sequence); and zeros behind what the attention reads.

// Zeros in rows [first, first + 8) of x, but none from `end` on. All threads.
__device__ void ZeroRows(Bf16* x, int64_t row_stride, int first, int end, int head_dim) {
  const int n = min(8, end - first) * head_dim;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    x[(first + i / head_dim) * row_stride + i % head_dim] = Bf16{0};
  }
}

__global__ void __launch_bounds__(kMarkThreads, 1)
    MarkKernel(const DmsPrefillCompactParams p, const PrefillScratch scratch) {
  ptx::WaitForPredecessors();
  ptx::LetDependentsStart();
  const DmsPrefillBatch& b = p.batch;
  const int head = blockIdx.x;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int expired = internal::MarkPiece(p, scratch, s);
  if (expired < 0) return;
  const int64_t compact = (int64_t{head} * b.compact_rows) * b.head_dim;
  ZeroRows(b.compact_k + compact, b.head_dim, s.compact_row + expired, b.compact_rows, b.head_dim);
  ZeroRows(b.compact_v + compact, b.head_dim, s.compact_row + expired, b.compact_rows, b.head_dim);
  const int64_t stride = int64_t{b.num_kv_heads} * b.head_dim;
  const int end = s.band_row + s.num_prefix + s.num_tokens;
  ZeroRows(b.band_k + head * b.head_dim, stride, end, b.band_rows, b.head_dim);
  ZeroRows(b.band_v + head * b.head_dim, stride, end, b.band_rows, b.head_dim);
}

// ---------------------------------------------------------------------------
// Store: four lanes a K or V of one token and head, a warp four such rows of
// [tokens, heads], which lie side by side. Grid (1 + pieces of the longest band, batch); the
// first block plans. All but the place of a survivor is done before the marks are there.
// Shared memory: the flat rows on their way out, and the plan's counts.

constexpr int kStoreWarps = 8, kStoreThreads = 32 * kStoreWarps;
constexpr int kItems = 4;                          // tokens of a head, a warp
constexpr int kBlockItems = kItems * kStoreWarps;  // a block
constexpr int kStoreBlocks = 4;                    // an SM

// The warp's rows of the chunk, side by side: those of their words that lie in [from, to).
template <int kWords>
__device__ __forceinline__ void StoreRows(const uint8_t* rows, uint8_t* out, int from, int to) {
  const uint32_t lane = threadIdx.x % 32;
  if (from == 0 && to == kWords && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
#pragma unroll
    for (uint32_t i = lane; i < kWords / 4; i += 32) {
      reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(rows)[i];
    }
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(lane); i < kWords; i += 32) {
      if (i >= from && i < to) {
        reinterpret_cast<uint32_t*>(out)[i] = reinterpret_cast<const uint32_t*>(rows)[i];
      }
    }
  }
}

// Blocks from number `late` on start when others have ended, so when the marks are there.
// heads_inverse: 2^32 / num_kv_heads rounded down, but at most 2^32 - 1.
template <int kDim, KvElement kK, KvElement kV>
__global__ void __launch_bounds__(kStoreThreads, kStoreBlocks)
    StoreKernel(const DmsPrefillCompactParams p, const PrefillScratch scratch, int positions,
                uint32_t late, uint32_t heads_inverse) {
  constexpr int kWords = kDim / 8;  // of two values, a lane
  constexpr int kKBytes = kDim * static_cast<int>(KvElementBytes(kK));
  constexpr int kVBytes = kDim * static_cast<int>(KvElementBytes(kV));
  constexpr int kScaleAt = kKBytes + kVBytes;
  constexpr int kTokenBytes =
      kScaleAt + static_cast<int>(KvScaleBytes(kK)) + static_cast<int>(KvScaleBytes(kV));
  static_assert(kTokenBytes % 4 == 0);
  union Shared {
    uint8_t rows[kStoreWarps][kItems][kTokenBytes];
    struct {
      int counts[kBuckets];
      int warp_sums[kStoreWarps];
    } plan;
  };
  __shared__ alignas(16) Shared shared;
  const DmsPrefillBatch& b = p.batch;
  ptx::LetDependentsStart();
  if (blockIdx.x == 0) {
    ptx::WaitForPredecessors();
    if (blockIdx.y == 0)
      internal::Plan<kStoreThreads>(b, scratch, positions, shared.plan.counts,
                                    shared.plan.warp_sums);
    return;
  }
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, four = lane % 4;
  const bool is_v = (lane & 4) != 0;
  auto& rows = shared.rows[warp];
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int heads = b.num_kv_heads, band = s.num_prefix + s.num_tokens;
  const int first = static_cast<int>((blockIdx.x - 1) * kBlockItems + warp * kItems);
  int item = first + static_cast<int>(lane / 8);  // of [band, heads]
  int i = static_cast<int>(__umulhi(static_cast<uint32_t>(item), heads_inverse));
  int head = item - i * heads;
  if (head >= heads) {
    head -= heads;
    ++i;
  }
  const auto stored = [&] {
    return (is_v ? b.band_v : b.band_k) + ((int64_t{s.band_row} * heads + item) * kDim + 8 * four);
  };
  const auto mark = [&] {
    return i < NumExpirable(band, b.window) ? scratch.marks[head * b.band_rows + s.band_row + i]
                                            : 0;
  };
  int own_mark = 0;
  if (blockIdx.x >= late) {
    ptx::WaitForPredecessors();
    own_mark = mark();
  }
  uint32_t x[kWords] = {};
  const auto get = [&](const Bf16* in) {
#pragma unroll
    for (int n = 0; n < kWords; n += 4) {
      const uint4 piece = *reinterpret_cast<const uint4*>(in + 8 * n);
      x[n] = piece.x;
      x[n + 1] = piece.y;
      x[n + 2] = piece.z;
      x[n + 3] = piece.w;
    }
  };
  const auto put = [&](Bf16* out) {
#pragma unroll
    for (int n = 0; n < kWords; n += 4) {
      *reinterpret_cast<uint4*>(out + 8 * n) = make_uint4(x[n], x[n + 1], x[n + 2], x[n + 3]);
    }
  };
  if (i < band && i >= s.num_prefix) {
    get((is_v ? p.v : p.k) +
        (int64_t{s.row + i - s.num_prefix} * p.kv_stride + head * kDim + 8 * four));
  }
  // All lanes go along, those of what is stored already with zeros.
  uint8_t* row = rows[lane / 8];
  uint8_t* codes = is_v ? row + kKBytes : row;
  uint8_t* scale = row + kScaleAt + (is_v ? static_cast<int>(KvScaleBytes(kK)) : 0);
  if constexpr (kK == kV) {  // one path for all lanes if the elements are of one kind
    internal::StoreVector<kK, ~0u>(x, four, codes, scale);
  } else if (!is_v) {
    internal::StoreVector<kK, 0x0f0f0f0fu>(x, four, codes, scale);
  } else {
    internal::StoreVector<kV, 0xf0f0f0f0u>(x, four, codes, scale);
  }
  // What is made of these is made anew below, rather than kept in registers.
  asm volatile("" : "+r"(item), "+r"(i), "+r"(head));
  if (i < band) {
    if (i >= s.num_prefix) {
      put(stored());
    } else {
      get(stored());
    }
  }
  if (p.rows != nullptr) {
    __syncwarp();
    constexpr int kRowWords = kTokenBytes / 4;
    const int chunk_item = first - s.num_prefix * heads;  // of [num_tokens, heads]
    StoreRows<kItems * kRowWords>(
        rows[0], p.rows + (int64_t{s.row} * heads + chunk_item) * kTokenBytes,
        kRowWords * max(0, min(kItems, -chunk_item)),
        kRowWords * max(0, min(kItems, s.num_tokens * heads - chunk_item)));
  }
  if (blockIdx.x < late) {
    ptx::WaitForPredecessors();
    own_mark = mark();
  }
  if ((own_mark & 1) != 0) {
    put((is_v ? b.compact_v : b.compact_k) +
        ((int64_t{head} * b.compact_rows + s.compact_row + (own_mark >> 1)) * kDim + 8 * four));
  }
}

template <int kDim, KvElement kK, KvElement kV>
absl::Status EnqueueStore(const DmsPrefillCompactParams& p, const PrefillScratch& scratch,
                          StreamHandle stream) {
  WINNOW_ASSIGN_OR_RETURN(const int num_sms, NumSms());
  const int64_t items = int64_t{p.batch.max_band} * p.batch.num_kv_heads;
  const dim3 grid(static_cast<unsigned>(1 + (items + kBlockItems - 1) / kBlockItems),
                  static_cast<unsigned>(p.batch.batch));
  return LaunchEarly(
      StoreKernel<kDim, kK, kV>, grid, kStoreThreads, 0, stream, p, scratch,
      internal::TilePositions(kDim, p.batch.group), static_cast<uint32_t>(num_sms * kStoreBlocks),
      std::numeric_limits<uint32_t>::max() / static_cast<uint32_t>(p.batch.num_kv_heads));
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
  WINNOW_RETURN_IF_ERROR(
      LaunchEarly(MarkKernel, internal::MarkGrid(b), kMarkThreads, 0, stream, params, scratch));
  if (params.k == nullptr) {
    return b.head_dim == 64 ? EnqueueLayOut<64>(b, scratch, stream)
                            : EnqueueLayOut<128>(b, scratch, stream);
  }
  return b.head_dim == 64 ? EnqueueStore<64>(params, scratch, stream)
                          : EnqueueStore<128>(params, scratch, stream);
}

}  // namespace winnow::kernels
