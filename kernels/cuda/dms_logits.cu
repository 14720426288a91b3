#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/dms_logits.h"
#include "kernels/cuda/launch.cuh"

namespace winnow::kernels {
namespace {

constexpr int kFewRows = 512;  // up to here one row and head a block fills the GPU better

__device__ float Value(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

// Sixteen lanes for kRows rows and kHeads heads; lane l has the law's sum of h % 16 == l. Tiles of
// kColumns columns come through shared memory, kStages under way.
constexpr int kRows = 4, kHeads = 8, kColumns = 128, kStages = 4;
constexpr int kThreads = 64, kBlockRows = kThreads / 16 * kRows;

struct Tile {
  alignas(16) float weight[kHeads][kColumns];
  uint16_t x[kBlockRows][kColumns + 8];  // BF16; so that a warp's two halves meet different banks
};

// The tile of rows and heads from `row` and `head` on, the last ones again past the end, and
// zeros past the last column, which change no sum. kAligned: by asynchronous copies.
template <bool kAligned>
__device__ __forceinline__ void CopyTile(const DmsLogitsCudaParams& p, int row, int head,
                                         int column, Tile& tile) {
  const auto copy = [&](auto* to, const auto* from, int columns_of_piece, int at) {
    const int left = p.hidden - column - at;
    if constexpr (kAligned) {
      __pipeline_memcpy_async(to, left > 0 ? from + at : from, 16, left > 0 ? 0 : 16);
    } else {
      for (int i = 0; i < columns_of_piece; ++i)
        to[i] = i < left ? from[at + i] : std::remove_reference_t<decltype(*to)>{};
    }
  };
  const auto* x = reinterpret_cast<const uint16_t*>(p.x);
  constexpr int kXPieces = kColumns / 8, kWeightPieces = kColumns / 4;
  for (int i = static_cast<int>(threadIdx.x); i < kBlockRows * kXPieces; i += kThreads) {
    const int r = i / kXPieces, at = i % kXPieces * 8;
    copy(&tile.x[r][at], x + min(row + r, p.m - 1) * p.x_stride + column, 8, at);
  }
  for (int i = static_cast<int>(threadIdx.x); i < kHeads * kWeightPieces; i += kThreads) {
    const int g = i / kWeightPieces, at = i % kWeightPieces * 4;
    const int64_t weight_row = min(head + g, p.num_kv_heads - 1);
    copy(&tile.weight[g][at], p.weight + weight_row * p.hidden + column, 4, at);
  }
}

// Grid (pieces of the rows, pieces of the heads).
template <bool kAligned>
__global__ void __launch_bounds__(kThreads) LogitsKernel(const DmsLogitsCudaParams p) {
  __shared__ Tile tiles[kStages];
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const int first_row = static_cast<int>(blockIdx.x) * kBlockRows;
  const int own_row = static_cast<int>(threadIdx.x) / 16 * kRows;
  const int head = static_cast<int>(blockIdx.y) * kHeads;
  const int num_tiles = (p.hidden + kColumns - 1) / kColumns;
  const auto start = [&](int n) {
    if (n < num_tiles) {
      CopyTile<kAligned>(p, first_row, head, n * kColumns, tiles[n % kStages]);
    }
    __pipeline_commit();
  };
  for (int n = 0; n < kStages - 1; ++n) start(n);
  float sums[kRows][kHeads] = {};
  for (int n = 0; n < num_tiles; ++n) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // tile n is there, tile n - 1 is read
    start(n + kStages - 1);
    const Tile& tile = tiles[n % kStages];
#pragma unroll 2
    for (int h = lane; h < kColumns; h += 16) {
      float weights[kHeads];
#pragma unroll
      for (int g = 0; g < kHeads; ++g) weights[g] = tile.weight[g][h];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float value = Value(tile.x[own_row + r][h]);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
          sums[r][g] = __fadd_rn(sums[r][g], __fmul_rn(value, weights[g]));
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      float sum = sums[r][g];
#pragma unroll
      for (int width = 8; width > 0; width /= 2) {
        sum = __fadd_rn(sum, __shfl_down_sync(0xffffffffu, sum, width, 16));
      }
      const int row = first_row + own_row + r;
      if (lane != 0 || row >= p.m || head + g >= p.num_kv_heads) continue;
      if (p.bias != nullptr) sum = __fadd_rn(sum, p.bias[head + g]);
      p.out[int64_t{row} * p.num_kv_heads + head + g] = sum;
    }
  }
}

// The same where rows are few: a block for one row and head has all its products at once, in
// shared memory, so that only additions wait for each other. Grid (rows, heads).
constexpr int kFewThreads = 256, kEach = 16;  // products of a thread, at a time
__global__ void __launch_bounds__(kFewThreads) FewLogitsKernel(const DmsLogitsCudaParams p) {
  constexpr int kTile = kFewThreads * kEach;
  __shared__ float products[kTile];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 16;
  const int64_t row = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y);
  const Bf16* x = p.x + row * p.x_stride;
  const float* w = p.weight + int64_t{head} * p.hidden;
  float sum = 0.0f;
  for (int first = 0; first < p.hidden; first += kTile) {
    const int end = min(kTile, p.hidden - first);
    float own[kEach], weights[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = i * kFewThreads + thread;
      if (at >= end) continue;
      own[i] = Value(x[first + at].bits);
      weights[i] = w[first + at];
    }
    __syncthreads();  // what was there is read
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = i * kFewThreads + thread;
      if (at < end) products[at] = __fmul_rn(own[i], weights[i]);
    }
    __syncthreads();
    if (thread >= 32) continue;  // both halves of the first warp do the same
#pragma unroll 32
    for (int at = lane; at < end; at += 16) sum = __fadd_rn(sum, products[at]);
  }
  if (thread >= 32) return;
  __syncwarp();
#pragma unroll
  for (int width = 8; width > 0; width /= 2) {
    sum = __fadd_rn(sum, __shfl_down_sync(0xffffffffu, sum, width, 16));
  }
  if (thread != 0) return;
  if (p.bias != nullptr) sum = __fadd_rn(sum, p.bias[head]);
  p.out[row * p.num_kv_heads + head] = sum;
}

}  // namespace

absl::Status ValidateDmsLogitsCuda(const DmsLogitsCudaParams& p) {
  constexpr int kMost = 1 << 30;  // both are stepped through in 32 bits
  if (p.m < 0 || p.m > kMost || p.hidden < 1 || p.hidden > kMost || p.num_kv_heads < 1 ||
      p.num_kv_heads > 65535 || p.x_stride < p.hidden) {
    return absl::InvalidArgumentError(absl::StrCat("dms_logits: m=", p.m, " hidden=", p.hidden,
                                                   " num_kv_heads=", p.num_kv_heads,
                                                   " x_stride=", p.x_stride));
  }
  if (p.x == nullptr || p.weight == nullptr || p.out == nullptr) {
    return absl::InvalidArgumentError("dms_logits: x, weight or out is null");
  }
  return absl::OkStatus();
}

absl::Status LaunchDmsLogits(const DmsLogitsCudaParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsLogitsCuda(params));
  if (params.m == 0) return absl::OkStatus();
  if (params.m <= kFewRows) {
    const dim3 grid(static_cast<unsigned>(params.m), static_cast<unsigned>(params.num_kv_heads));
    FewLogitsKernel<<<grid, kFewThreads, 0, stream>>>(params);
    return CudaStatus(cudaGetLastError());
  }
  const bool aligned = params.hidden % 8 == 0 && params.x_stride % 8 == 0 &&
                       Aligned(params.x, 16) && Aligned(params.weight, 16);
  const dim3 grid(static_cast<unsigned>((params.m + kBlockRows - 1) / kBlockRows),
                  static_cast<unsigned>((params.num_kv_heads + kHeads - 1) / kHeads));
  const auto kernel = aligned ? LogitsKernel<true> : LogitsKernel<false>;
  kernel<<<grid, kThreads, 0, stream>>>(params);
  return CudaStatus(cudaGetLastError());
}

}  // namespace winnow::kernels
