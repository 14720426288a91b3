#include <cuda_runtime.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/decode_plan.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/launch.cuh"

namespace winnow::kernels {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kClasses = 16;
constexpr unsigned kAll = 0xffffffffu;

// Of pieces: the more pages the higher.
__device__ __forceinline__ int ClassOf(int num_pages) {
  if (num_pages <= kPagesPerUnit) return num_pages - 1;
  return min(kPagesPerUnit - 1 + 32 - __clz((num_pages - 1) / kPagesPerUnit), kClasses - 1);
}

__device__ __forceinline__ int WarpExclusiveSum(int x, int lane, int* total) {
  int sum = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kAll, sum, offset);
    if (lane >= offset) sum += other;
  }
  *total = __shfl_sync(kAll, sum, 31);
  return sum - x;
}

// How one span is cut.
struct Cut {
  int row = 0, span = 0;
  int num_survivors = 0, num_ring = 0;
  int fresh = -1;
  int num_pieces = 0;
  int pages = 0;
  int full = 1;  // pages of a piece, but of each half's last
  int middle = 1, last = 1;
  int first_pieces = 0;  // of the first half

  // One item for the whole span.
  __device__ __forceinline__ void MakeWhole() {
    num_pieces = first_pieces = 1;
    full = last = pages;
  }
  __device__ __forceinline__ int num_full() const { return max(num_pieces - 2, 0); }
};

__device__ Cut CutSpan(const DecodePlanParams& p, int layer, int row, int num_rows, int slots) {
  Cut cut;
  if (row >= num_rows) return cut;
  const int heads = p.spans.num_kv_heads, window = p.spans.window;
  const int slot = p.slots[row / heads];
  if (slot < 0) return cut;
  cut.row = row;
  cut.span = slot * heads + row % heads;
  const SpanState state =
      p.spans.state[static_cast<int64_t>(layer) * p.spans.max_sequences * heads + cut.span];
  if (state.num_tokens == 0) return cut;
  cut.num_survivors = state.num_survivors;
  cut.num_ring = state.num_ring;
  const int survivors = (state.num_survivors + slots - 1) / slots;
  const int pages = survivors + (state.num_ring + slots - 1) / slots + 1;
  if (state.num_ring > 0) {
    // The slot before the oldest, or the last while the ring fills.
    const int at = state.num_ring == window && state.ring_start > 0 ? state.ring_start - 1
                                                                    : state.num_ring - 1;
    cut.fresh = survivors + at / slots;
  }
  cut.pages = pages;
  const SpanCut pieces(pages);
  cut.full = pieces.unit;
  cut.num_pieces = pieces.num_pieces();
  cut.first_pieces = pieces.first_pieces();
  cut.middle = pieces.half - (cut.first_pieces - 1) * cut.full;
  cut.last = pages - pieces.PieceStart(cut.num_pieces - 1);
  return cut;
}

// The first page of the share of block `rank` of `active`: half of the blocks share the first half,
// whose short piece, as the second's, is its last.
__device__ __forceinline__ int ShareBegin(const Cut& cut, const SpanCut& pieces, int rank,
                                          int active) {
  if (rank == active) return cut.pages;
  const bool is_first = 2 * rank < active;
  const int before = is_first ? 0 : cut.first_pieces;
  const int in_half = is_first ? cut.first_pieces : cut.num_pieces - cut.first_pieces;
  return pieces.PieceStart(before + (2 * rank - (is_first ? 0 : active)) * in_half / active);
}

// The layer's shares, if its longest is neither that long nor much longer than their mean: else
// false. All of the block's threads; `first_cut` is of row threadIdx.x.
__device__ bool ListShares(const DecodePlanParams& p, int layer, int num_rows, int slots,
                           int cluster, int total_pages, int longest_share, const Cut& first_cut) {
  const int shares = num_rows * cluster, tid = static_cast<int>(threadIdx.x);
  if (cluster < 2 || shares > p.plan.max_pieces) return false;
  if (longest_share > min(kMaxSharePages, 2 * (total_pages / shares) + 2 * kPagesPerUnit)) {
    return false;
  }
  DecodePiece* pieces = p.plan.pieces + static_cast<int64_t>(layer) * p.plan.max_pieces;
  for (int row = tid; row < num_rows; row += static_cast<int>(blockDim.x)) {
    const Cut cut = row == tid ? first_cut : CutSpan(p, layer, row, num_rows, slots);
    const SpanCut span(cut.pages);
    const int active = min(cluster, cut.num_pieces);
    DecodePiece share = {.row = row,
                         .span = cut.span,
                         .first_page = 0,
                         .num_pages = 0,
                         .partial = kShare,
                         .num_survivors = cut.num_survivors,
                         .num_ring = cut.num_ring,
                         .fresh_ring_page = cut.fresh};
    for (int rank = 0; rank < cluster; ++rank) {
      if (rank < active) {
        share.first_page = ShareBegin(cut, span, rank, active);
        share.num_pages = ShareBegin(cut, span, rank + 1, active) - share.first_page;
      } else {
        share.first_page = share.num_pages = 0;
      }
      pieces[row * cluster + rank] = share;
    }
  }
  if (tid == 0) p.plan.num_pieces[layer] = shares;
  return true;
}

// Calls visit(c, n) for every class c of which the warp's lanes have pieces; n is the lane's.
template <typename Visit>
__device__ __forceinline__ void ForEachClass(const Cut& cut, Visit visit) {
  const int full = cut.num_pieces > 2 ? ClassOf(cut.full) : -1;
  const int middle = cut.num_pieces > 1 ? ClassOf(cut.middle) : -1;
  const int last = cut.num_pieces > 0 ? ClassOf(cut.last) : -1;
  unsigned classes = (full >= 0 ? 1u << full : 0) | (middle >= 0 ? 1u << middle : 0) |
                     (last >= 0 ? 1u << last : 0);
  classes = __reduce_or_sync(kAll, classes);
  while (classes != 0) {
    const int c = 31 - __clz(classes);
    classes ^= 1u << c;
    visit(c, (full == c ? cut.num_full() : 0) + (middle == c ? 1 : 0) + (last == c ? 1 : 0));
  }
}

// Grid: a block a layer. A thread cuts a span, a warp writes the pieces of its 32 spans.
// Shared memory: the pieces of each class, counted first, then dealt out.
//
// Where the device's blocks have several spans each, most spans are one item each, which
// costs no partial results; the other spans' pieces come last and even out the blocks' ends.
__global__ void __launch_bounds__(kMaxThreads)
    DecodePlanKernel(const DecodePlanParams p, int slots, int num_blocks, int cluster) {
  __shared__ int class_count[kClasses], class_next[kClasses], partials, fits;
  __shared__ int total_pages, longest, longest_share;
  const int layer = static_cast<int>(blockIdx.x), threads = static_cast<int>(blockDim.x);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int num_rows = p.num_seqs * p.spans.num_kv_heads;
  const int padded_rows = (num_rows + 31) / 32 * 32;  // whole warps
  if (tid < kClasses) class_count[tid] = 0;
  if (tid == 0) partials = total_pages = longest = longest_share = 0;
  Cut first_cut = CutSpan(p, layer, tid, num_rows, slots);
  __syncthreads();
  for (int row = tid; row < padded_rows; row += threads) {
    const Cut cut = row == tid ? first_cut : CutSpan(p, layer, row, num_rows, slots);
    const int sum = __reduce_add_sync(kAll, cut.pages);
    const int share = cut.num_pieces > kMaxSharedPieces
                          ? cut.pages
                          : (cut.num_pieces + cluster - 1) / cluster * cut.full;
    const int longer = __reduce_max_sync(kAll, min(share, cut.pages));
    if (lane == 0) {
      atomicAdd(&total_pages, sum);
      atomicMax(&longest_share, longer);
    }
  }
  __syncthreads();
  if (ListShares(p, layer, num_rows, slots, cluster, total_pages, longest_share, first_cut)) {
    return;
  }
  const int most = total_pages / num_blocks * 2 / 3;  // pages of a span that may stay whole
  for (int row = tid; row < padded_rows; row += threads) {
    const Cut cut = row == tid ? first_cut : CutSpan(p, layer, row, num_rows, slots);
    const int largest = __reduce_max_sync(kAll, cut.pages <= most ? cut.pages : 0);
    if (lane == 0) atomicMax(&longest, largest);
  }
  __syncthreads();
  // Pieces worth 0.6 of the longest such span a block are left; none where whole spans of that
  // length end nearly together.
  const float round = static_cast<float>(num_blocks) * static_cast<float>(longest);
  const float rounds = static_cast<float>(total_pages) / fmaxf(1.0f, round);
  const float left = rounds - floorf(rounds) > 0.75f ? 0.0f : 0.6f * round;
  const int whole_rows =
      static_cast<int>(static_cast<float>(num_rows) *
                       fmaxf(0.0f, 1.0f - left / fmaxf(1.0f, static_cast<float>(total_pages))));
  const auto settle = [&](Cut& cut) {
    if (cut.num_pieces > 1 && cut.row < whole_rows && cut.pages <= most) cut.MakeWhole();
  };
  const auto cut_span = [&](int row) {
    Cut cut = row == tid ? first_cut : CutSpan(p, layer, row, num_rows, slots);
    settle(cut);
    return cut;
  };
  for (int row = tid; row < padded_rows; row += threads) {
    const Cut cut = cut_span(row);
    ForEachClass(cut, [&](int c, int n) {
      const int sum = __reduce_add_sync(kAll, n);
      if (lane == 0) atomicAdd(&class_count[c], sum);
    });
  }
  __syncthreads();
  if (tid < 32) {
    // Larger classes first.
    const int c = kClasses - 1 - lane;
    int total;
    const int before = WarpExclusiveSum(c >= 0 ? class_count[c] : 0, lane, &total);
    if (c >= 0) class_next[c] = before;
    if (lane == 0) {
      fits = total <= p.plan.max_pieces ? 1 : 0;
      if (fits == 0) *p.plan.overflow = 1;
      p.plan.num_pieces[layer] = fits != 0 ? total : 0;
    }
  }
  __syncthreads();
  if (fits == 0) return;
  DecodePiece* pieces = p.plan.pieces + static_cast<int64_t>(layer) * p.plan.max_pieces;
  for (int row = tid; row < padded_rows; row += threads) {
    const Cut cut = cut_span(row);
    const int full_class = ClassOf(cut.full), middle_class = ClassOf(cut.middle);
    const int last_class = ClassOf(cut.last);
    int full_at = 0, middle_at = 0, last_at = 0;
    ForEachClass(cut, [&](int c, int n) {
      int total;
      int at = WarpExclusiveSum(n, lane, &total);
      int base = 0;
      if (lane == 0) base = atomicAdd(&class_next[c], total);
      at += __shfl_sync(kAll, base, 0);
      if (full_class == c) full_at = at;
      // The last has the lane's last place, the middle one that before it if both are in the class.
      if (middle_class == c) middle_at = at + n - (last_class == c ? 2 : 1);
      if (last_class == c) last_at = at + n - 1;
    });
    int total_partials;
    int partial = WarpExclusiveSum(cut.num_pieces > 1 ? cut.num_pieces : 0, lane, &total_partials);
    int partial_base = 0;
    if (lane == 0 && total_partials > 0) partial_base = atomicAdd(&partials, total_partials);
    partial += __shfl_sync(kAll, partial_base, 0);

    int total;
    const int first = WarpExclusiveSum(cut.num_pieces, lane, &total);
    for (int i = lane; i - lane < total; i += 32) {
      int owner = 0;  // the last lane whose first piece is not past i, and that has pieces
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        const int candidate = owner + step;
        const int candidate_first = __shfl_sync(kAll, first, candidate);
        if (candidate_first <= i) owner = candidate;
      }
      const auto of_owner = [owner](int x) { return __shfl_sync(kAll, x, owner); };
      DecodePiece piece;
      piece.row = of_owner(cut.row);
      piece.span = of_owner(cut.span);
      piece.partial = of_owner(partial);
      piece.num_survivors = of_owner(cut.num_survivors);
      piece.num_ring = of_owner(cut.num_ring);
      piece.fresh_ring_page = of_owner(cut.fresh);
      const int num_pieces = of_owner(cut.num_pieces), index = i - of_owner(first);
      const int full = of_owner(cut.full), middle = of_owner(cut.middle), last = of_owner(cut.last);
      const int first_pieces = of_owner(cut.first_pieces);
      const int full_start = of_owner(full_at), middle_place = of_owner(middle_at);
      const int last_place = of_owner(last_at);
      if (i >= total) continue;  // every lane comes here in the last turn alone
      const bool is_first_half = index < first_pieces;
      piece.first_page = index * full - (is_first_half ? 0 : full - middle);
      if (index == num_pieces - 1) {
        piece.num_pages = last;
        pieces[last_place] = piece;
      } else if (index == first_pieces - 1) {
        piece.num_pages = middle;
        pieces[middle_place] = piece;
      } else {
        piece.num_pages = full;
        pieces[full_start + index - (is_first_half ? 0 : 1)] = piece;
      }
    }
  }
}

}  // namespace

absl::Status ValidateDecodePlan(const DecodePlanParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateDeviceSpans("decode_plan", p.spans));
  if (p.num_seqs < 0 || p.num_seqs > kMaxDecodeRows / p.spans.num_kv_heads ||
      p.plan.max_pieces < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_plan: num_seqs=", p.num_seqs, " max_pieces=", p.plan.max_pieces));
  }
  if (p.slots == nullptr || p.plan.pieces == nullptr || !Aligned(p.plan.pieces, 32) ||
      p.plan.num_pieces == nullptr || p.plan.overflow == nullptr) {
    return absl::InvalidArgumentError("decode_plan: a pointer is null, or pieces misaligned");
  }
  return absl::OkStatus();
}

absl::Status LaunchDecodePlan(const DecodePlanParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDecodePlan(params));
  if (params.num_seqs == 0) return absl::OkStatus();
  const int rows = params.num_seqs * params.spans.num_kv_heads;
  const int threads = std::min((rows + 31) / 32 * 32, kMaxThreads);
  WINNOW_ASSIGN_OR_RETURN(const int num_sms, NumSms());
  const int num_blocks = params.force_blocks > 0 ? params.force_blocks : 2 * num_sms;
  const bool clusters = params.force_blocks == 0 &&
                        CanWaitForPredecessors(reinterpret_cast<const void*>(DecodePlanKernel));
  DecodePlanKernel<<<params.spans.num_layers, threads, 0, stream>>>(
      params, params.spans.slots_per_page(), num_blocks, clusters ? DecodeClusterBlocks(rows) : 1);
  return CudaStatus(cudaGetLastError());
}

}  // namespace winnow::kernels
