#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/page_pool.cuh"

namespace winnow::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

struct Shape {
  int slots, ring_pages;  // of a page; of a span
  int64_t num_rows;       // spans of the batch: layers * sequences * heads
};

// The span's index, -1 if the row has none.
__device__ __forceinline__ int64_t SpanOf(const DecodeStepParams& p, const Shape& shape,
                                          int64_t row) {
  if (row >= shape.num_rows) return -1;
  const int heads = p.spans.num_kv_heads;
  const int64_t layer = row / (p.num_seqs * heads);
  const int in_layer = static_cast<int>(row % (p.num_seqs * heads));
  const int slot = p.slots[in_layer / heads];
  if (slot < 0) return -1;
  return (layer * p.spans.max_sequences + slot) * heads + in_layer % heads;
}

// The sum of `x` over the threads before this one; *total of all. Has barriers.
__device__ int BlockExclusiveSum(int x, int (&warp_sums)[kWarps], int* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int sum = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kAll, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  *total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    *total += warp_sums[w];
  }
  return before + sum - x;
}

// Grid: a thread a span. A block's pages are counted, summed and taken at once.
__global__ void __launch_bounds__(kThreads)
    DecodeStepKernel(const DecodeStepParams p, const Shape shape) {
  __shared__ int warp_sums[kWarps], first, taken;
  const int64_t row = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t span = SpanOf(p, shape, row);
  SpanState state;
  int32_t* page_at = nullptr;  // where the id of a new page belongs
  bool full_table = false;
  if (span >= 0) {
    state = p.spans.state[span];
    const int window = p.spans.window;
    bool survives = false;
    if (state.num_tokens > 0) {
      if (window == 0) {
        survives = true;
      } else if (state.num_ring < window) {
        if (state.num_ring % shape.slots == 0) {
          page_at = p.spans.ring_pages + span * shape.ring_pages + state.num_ring / shape.slots;
        }
        ++state.num_ring;
      } else {
        survives = p.spans.ring_evict[span * (window + 1) + state.ring_start] == 0;
        state.ring_start = state.ring_start + 1 == window ? 0 : state.ring_start + 1;
      }
    }
    if (survives) {
      const int page = state.num_survivors / shape.slots;
      if (state.num_survivors % shape.slots == 0) {
        full_table = page >= p.spans.max_survivor_pages;
        if (!full_table) {
          page_at = p.spans.survivor_pages + span * p.spans.max_survivor_pages + page;
        }
      }
      ++state.num_survivors;
    }
    ++state.num_tokens;
  }
  int total;
  const int before = BlockExclusiveSum(page_at != nullptr ? 1 : 0, warp_sums, &total);
  if (threadIdx.x == 0 && total > 0) {
    taken = device::TakePages(p.pool.num_free, total, 1, &first);
  }
  __syncthreads();
  if (span < 0) return;
  if (full_table || (page_at != nullptr && before >= taken)) {
    *p.pool.exhausted = 1;  // the span stays as it was
    return;
  }
  if (page_at != nullptr) *page_at = p.pool.free_pages[first + before];
  p.spans.state[span] = state;
}

// Grid: a thread a span, as above; then a warp writes the ids of its 32 spans.
__global__ void __launch_bounds__(kThreads)
    ReleaseKernel(const DecodeStepParams p, const Shape shape) {
  __shared__ int warp_sums[kWarps], first;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t span = SpanOf(p, shape, row);
  int survivors = 0, ring = 0;
  if (span >= 0) {
    const SpanState state = p.spans.state[span];
    survivors = (state.num_survivors + shape.slots - 1) / shape.slots;
    ring = (state.num_ring + shape.slots - 1) / shape.slots;
    p.spans.state[span] = SpanState{};
  }
  int total;
  const int before = BlockExclusiveSum(survivors + ring, warp_sums, &total);
  if (total == 0) return;
  if (threadIdx.x == 0) first = atomicAdd(p.pool.num_free, total);
  __syncthreads();
  for (int i = 0; i < 32; ++i) {
    const int64_t owner = __shfl_sync(kAll, static_cast<long long>(span), i);
    const int num_survivors = __shfl_sync(kAll, survivors, i);
    const int num_ring = __shfl_sync(kAll, ring, i);
    const int at = first + __shfl_sync(kAll, before, i);
    for (int j = lane; j < num_survivors + num_ring; j += 32) {
      p.pool.free_pages[at + j] =
          j < num_survivors ? p.spans.survivor_pages[owner * p.spans.max_survivor_pages + j]
                            : p.spans.ring_pages[owner * shape.ring_pages + j - num_survivors];
    }
  }
}

Shape ShapeOf(const DecodeStepParams& p) {
  return {.slots = p.spans.slots_per_page(),
          .ring_pages = p.spans.ring_pages_per_span(),
          .num_rows = static_cast<int64_t>(p.spans.num_layers) * p.num_seqs * p.spans.num_kv_heads};
}

unsigned Blocks(const Shape& shape) {
  return static_cast<unsigned>((shape.num_rows + kThreads - 1) / kThreads);
}

}  // namespace

absl::Status ValidateDecodeStep(const DecodeStepParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateDeviceSpans("decode_step", p.spans));
  if (p.num_seqs < 0 || p.num_seqs > p.spans.max_sequences) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_step: num_seqs=", p.num_seqs, " of ", p.spans.max_sequences));
  }
  if (p.slots == nullptr || p.pool.free_pages == nullptr || p.pool.num_free == nullptr ||
      p.pool.exhausted == nullptr) {
    return absl::InvalidArgumentError("decode_step: a pointer is null");
  }
  return absl::OkStatus();
}

absl::Status LaunchDecodeStep(const DecodeStepParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDecodeStep(params));
  if (params.num_seqs == 0) return absl::OkStatus();
  const Shape shape = ShapeOf(params);
  DecodeStepKernel<<<Blocks(shape), kThreads, 0, stream>>>(params, shape);
  return CudaStatus(cudaGetLastError());
}

absl::Status LaunchReleaseSequences(const DecodeStepParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDecodeStep(params));
  if (params.num_seqs == 0) return absl::OkStatus();
  const Shape shape = ShapeOf(params);
  ReleaseKernel<<<Blocks(shape), kThreads, 0, stream>>>(params, shape);
  return CudaStatus(cudaGetLastError());
}

}  // namespace winnow::kernels
