#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/decode_plan.h"

namespace winnow::kernels {
namespace {

constexpr int kThreads = 1024;
constexpr int kClasses = 16;
constexpr unsigned kAll = 0xffffffffu;

// Of pieces: the more rounds of the attention's warps (and then the more pages), the higher.
__device__ __forceinline__ int ClassOf(int num_pages) {
  if (num_pages <= kPagesPerUnit) return num_pages - 1;
  const int rounds = (num_pages + kPagesPerUnit - 1) / kPagesPerUnit;
  return min(kPagesPerUnit - 1 + 32 - __clz(rounds - 1), kClasses - 1);
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
  SpanState state;
  int num_pages = 0;
  int num_pieces = 0;
  int full = 0;  // pages of every piece but the last
  int last = 0;  // pages of the last
};

__device__ Cut CutSpan(const DecodePlanParams& p, int layer, int row, int num_rows, int slots) {
  Cut cut;
  if (row >= num_rows) return cut;
  const int heads = p.spans.num_kv_heads;
  const int slot = p.slots[row / heads];
  if (slot < 0) return cut;
  cut.row = row;
  cut.span = slot * heads + row % heads;
  cut.state = p.spans.state[static_cast<int64_t>(layer) * p.spans.max_sequences * heads + cut.span];
  if (cut.state.num_tokens == 0) return cut;
  cut.num_pages =
      (cut.state.num_survivors + slots - 1) / slots + (cut.state.num_ring + slots - 1) / slots + 1;
  cut.full = PieceUnits(cut.num_pages) * kPagesPerUnit;
  cut.num_pieces = (cut.num_pages + cut.full - 1) / cut.full;
  cut.last = cut.num_pages - (cut.num_pieces - 1) * cut.full;
  return cut;
}

// Grid: a block a layer. A thread cuts a span, a warp writes the pieces of its 32 spans.
// Shared memory: the pieces of each class, counted first, then dealt out.
__global__ void __launch_bounds__(kThreads)
    DecodePlanKernel(const DecodePlanParams p, int slots, int ring_pages) {
  __shared__ int class_count[kClasses], class_next[kClasses], partials;
  const int layer = static_cast<int>(blockIdx.x);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int num_rows = p.num_seqs * p.spans.num_kv_heads;
  const int padded_rows = (num_rows + 31) / 32 * 32;  // whole warps
  if (tid < kClasses) class_count[tid] = 0;
  if (tid == 0) partials = 0;
  __syncthreads();
  for (int row = tid; row < padded_rows; row += kThreads) {
    const Cut cut = CutSpan(p, layer, row, num_rows, slots);
    for (int c = 0; c < kClasses; ++c) {
      int mine = 0;
      if (cut.num_pieces > 0) {
        mine = (ClassOf(cut.full) == c ? cut.num_pieces - 1 : 0) + (ClassOf(cut.last) == c ? 1 : 0);
      }
      const int sum = __reduce_add_sync(kAll, mine);
      if (lane == 0 && sum > 0) atomicAdd(&class_count[c], sum);
    }
  }
  __syncthreads();
  if (tid == 0) {
    int sum = 0;
    for (int c = kClasses - 1; c >= 0; --c) {
      class_next[c] = sum;
      sum += class_count[c];
    }
    p.plan.num_pieces[layer] = min(sum, p.plan.max_pieces);
  }
  __syncthreads();
  DecodePiece* pieces = p.plan.pieces + static_cast<int64_t>(layer) * p.plan.max_pieces;
  const int64_t first_span =
      static_cast<int64_t>(layer) * p.spans.max_sequences * p.spans.num_kv_heads;
  for (int row = tid; row < padded_rows; row += kThreads) {
    const Cut cut = CutSpan(p, layer, row, num_rows, slots);
    int full_at = 0, last_at = 0;
    for (int c = kClasses - 1; c >= 0; --c) {
      int full = 0, last = 0;
      if (cut.num_pieces > 0) {
        full = ClassOf(cut.full) == c ? cut.num_pieces - 1 : 0;
        last = ClassOf(cut.last) == c ? 1 : 0;
      }
      if (__ballot_sync(kAll, full + last > 0) == 0) continue;
      int total;
      int at = WarpExclusiveSum(full + last, lane, &total);
      int base = 0;
      if (lane == 0) base = atomicAdd(&class_next[c], total);
      at += __shfl_sync(kAll, base, 0);
      if (full > 0) full_at = at;
      if (last > 0) last_at = at + full;
    }
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
      DecodePiece piece = {};
      piece.row = of_owner(cut.row);
      piece.span = of_owner(cut.span);
      piece.num_pieces = of_owner(cut.num_pieces);
      piece.piece = i - of_owner(first);
      piece.partial = of_owner(partial);
      piece.num_survivors = of_owner(cut.state.num_survivors);
      piece.num_ring = of_owner(cut.state.num_ring);
      const int full = of_owner(cut.full), last = of_owner(cut.last);
      const int full_start = of_owner(full_at), last_start = of_owner(last_at);
      if (i >= total) continue;  // every lane comes here in the last turn alone
      const bool is_last = piece.piece == piece.num_pieces - 1;
      piece.first_page = piece.piece * full;
      piece.num_pages = is_last ? last : full;
      const int at = is_last ? last_start : full_start + piece.piece;
      const int survivors = (piece.num_survivors + slots - 1) / slots;
      const int ring = (piece.num_ring + slots - 1) / slots;
      const int64_t span = first_span + piece.span;
#pragma unroll
      for (int j = 0; j < kPagesPerUnit; ++j) {
        const int page = piece.first_page + j;
        piece.page[j] = -1;
        if (page < survivors) {
          piece.page[j] = p.spans.survivor_pages[span * p.spans.max_survivor_pages + page];
        } else if (page < survivors + ring) {
          piece.page[j] = p.spans.ring_pages[span * ring_pages + page - survivors];
        }
      }
      if (at < p.plan.max_pieces) pieces[at] = piece;
    }
  }
}

}  // namespace

absl::Status ValidateDecodePlan(const DecodePlanParams& p) {
  if (p.num_seqs < 0 || p.spans.num_layers < 1 || p.spans.num_kv_heads < 1 ||
      p.spans.max_sequences < 1 || p.spans.window < 0 || p.plan.max_pieces < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_plan: num_seqs=", p.num_seqs, " num_layers=", p.spans.num_layers,
                     " num_kv_heads=", p.spans.num_kv_heads,
                     " max_sequences=", p.spans.max_sequences, " max_pieces=", p.plan.max_pieces));
  }
  if (p.slots == nullptr || p.spans.state == nullptr || p.spans.survivor_pages == nullptr ||
      (p.spans.window > 0 && p.spans.ring_pages == nullptr) || p.plan.pieces == nullptr ||
      p.plan.num_pieces == nullptr) {
    return absl::InvalidArgumentError("decode_plan: a pointer is null");
  }
  return ValidateHeadDim(p.spans.head_dim);
}

absl::Status LaunchDecodePlan(const DecodePlanParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDecodePlan(params));
  if (params.num_seqs == 0) return absl::OkStatus();
  DecodePlanKernel<<<params.spans.num_layers, kThreads, 0, stream>>>(
      params, params.spans.slots_per_page(), params.spans.ring_pages_per_span());
  return CudaStatus(cudaGetLastError());
}

}  // namespace winnow::kernels
