#pragma once

#include <cuda_runtime.h>

#include <iterator>

#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/dms_prefill_consume.cuh"
#include "kernels/cuda/dms_prefill_plan.cuh"
#include "kernels/cuda/dms_prefill_produce.cuh"
#include "kernels/cuda/dms_prefill_sm90.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor_map.h"

// Survivors + band on Hopper. A block is one producer warpgroup (two threads that issue
// copies and a warp that plans tiles) and kConsumers warpgroups of 64 query rows; blocks
// stay and take tiles by ticket, longest first. A row of a tile is (position, head of the
// group), so all heads of a group share the keys: dms_prefill_list.cuh.
//
// The boxes of a block's tiles are one stream: the first Q K^T of a tile is under way
// while the last P V of the one before is, and that one's output is written meanwhile.
// The largest score is looked for in the first boxes of a tile only (each row's own key
// is among them). Weights of later boxes may be larger than 1, which float32 and BF16
// hold as well as smaller ones; if a row's sum passes kMostSum, the tile is done again
// with the largest score of every box.
//
// Shared memory: two tiles' queries [dim/64][rows][64], then kStages of K and V boxes
// [dim/64][kBoxKeys][64], all in 128-byte swizzled rows, then barriers and tiles.
namespace winnow::kernels::internal {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    PrefillSm90Kernel(const __grid_constant__ PrefillMaps maps,
                      const __grid_constant__ PrefillKernelArgs args) {
#if WINNOW_SM90A
  extern __shared__ uint8_t memory[];
  const uint32_t misaligned = ptx::SharedAddress(memory) & 1023;
  auto& shared =
      *reinterpret_cast<PrefillShared<Shape>*>(memory + (misaligned == 0 ? 0 : 1024 - misaligned));
  static_assert(sizeof(PrefillMaps) % sizeof(CUtensorMap) == 0);
  if (threadIdx.x >= 32 && threadIdx.x < 32 + sizeof(PrefillMaps) / sizeof(CUtensorMap)) {
    ptx::PrefetchMap(reinterpret_cast<const CUtensorMap*>(&maps) + (threadIdx.x - 32));
  }
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Shape::kConsumers;
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::BarrierInit(&shared.k_full[i], 1);
      ptx::BarrierInit(&shared.v_full[i], 1);
      ptx::BarrierInit(&shared.k_empty[i], kConsumerWarps * ptx::kWarpArrivals);
      ptx::BarrierInit(&shared.v_empty[i], kConsumerWarps * ptx::kWarpArrivals);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::BarrierInit(&shared.q_full[i], 1);
      ptx::BarrierInit(&shared.list_full[i], 1);
      ptx::BarrierInit(&shared.work_full[i], ptx::kWarpArrivals);
      ptx::BarrierInit(&shared.work_empty[i], kConsumerWarps * ptx::kWarpArrivals + 2);
      shared.redo[i] = 0;
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  ptx::WaitForPredecessors();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    ptx::RegistersDown<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) Produce<Shape, false>(args, maps, shared);
    if (threadIdx.x == 32) Produce<Shape, true>(args, maps, shared);
    if (threadIdx.x / 32 == 2) Schedule<Shape>(args, shared);
  } else {
    ptx::RegistersUp<Shape::kConsumerRegisters>();
    Consume<Shape>(args, shared, warpgroup - 1);
  }
#endif
}

// The maps of a tensor whose rows (of `rows`, `row_stride` elements apart) are cut in
// 64-column pieces, `head_stride` elements from one head to the next.
inline absl::StatusOr<RowMaps> MakeRowMaps(const Bf16* base, int head_dim, int rows, int heads,
                                           int64_t row_stride, int64_t head_stride) {
  const uint64_t pieces = static_cast<uint64_t>(head_dim / 64);
  const uint64_t sizes[] = {64, static_cast<uint64_t>(rows), pieces, static_cast<uint64_t>(heads)};
  const uint64_t strides[] = {static_cast<uint64_t>(row_stride) * 2, 128,
                              static_cast<uint64_t>(head_stride) * 2};
  const auto make = [&](uint32_t box_rows, uint32_t box_pieces) {
    const uint32_t box[] = {64, box_rows, box_pieces, 1};
    return MakeBf16TensorMap(base, sizes, strides, box);
  };
  RowMaps maps;
  for (uint32_t i = 0; i < std::size(maps.by); ++i) {
    WINNOW_ASSIGN_OR_RETURN(maps.by[i], make(8u << i, i == 4 ? static_cast<uint32_t>(pieces) : 1));
  }
  return maps;
}

template <typename Shape>
absl::Status EnqueuePrefillSm90(const DmsPrefillCudaParams& p, StreamHandle stream) {
  const DmsPrefillBatch& b = p.batch;
  const int positions = TilePositions(b.head_dim, b.group), heads = b.num_kv_heads * b.group;
  PrefillMaps maps;
  const uint64_t q_sizes[] = {static_cast<uint64_t>(b.head_dim), static_cast<uint64_t>(heads),
                              static_cast<uint64_t>(b.num_rows)};
  const uint64_t q_strides[] = {static_cast<uint64_t>(b.head_dim) * 2,
                                static_cast<uint64_t>(p.q_stride) * 2};
  const uint32_t q_box[] = {64, static_cast<uint32_t>(b.group), static_cast<uint32_t>(positions)};
  WINNOW_ASSIGN_OR_RETURN(maps.q, MakeBf16TensorMap(p.q, q_sizes, q_strides, q_box));
  const int64_t band_stride = int64_t{b.num_kv_heads} * b.head_dim;
  const int64_t compact_stride = int64_t{b.compact_rows} * b.head_dim;
  const auto band = [&](const Bf16* x) {
    return MakeRowMaps(x, b.head_dim, b.band_rows, b.num_kv_heads, band_stride, b.head_dim);
  };
  const auto compact = [&](const Bf16* x) {
    return MakeRowMaps(x, b.head_dim, b.compact_rows, b.num_kv_heads, b.head_dim, compact_stride);
  };
  WINNOW_ASSIGN_OR_RETURN(maps.band_k, band(b.band_k));
  WINNOW_ASSIGN_OR_RETURN(maps.band_v, band(b.band_v));
  WINNOW_ASSIGN_OR_RETURN(maps.compact_k, compact(b.compact_k));
  WINNOW_ASSIGN_OR_RETURN(maps.compact_v, compact(b.compact_v));

  constexpr int kSharedBytes = sizeof(PrefillShared<Shape>) + 1024;
  static_assert(kSharedBytes <= 227 * 1024);
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaFuncSetAttribute(
      PrefillSm90Kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)));
  WINNOW_ASSIGN_OR_RETURN(const int num_sms, NumSms());
  const PrefillKernelArgs args{.sequences = b.sequences,
                               .scratch = ScratchOf(b),
                               .out = p.out,
                               .num_kv_heads = b.num_kv_heads,
                               .group = b.group,
                               .window = b.window,
                               .band_rows = b.band_rows,
                               .positions = positions,
                               .scale_log2 = p.scale * 1.44269504088896340736f};
  const int blocks = num_sms < MaxTiles(b) ? num_sms : MaxTiles(b);
  return LaunchEarly(PrefillSm90Kernel<Shape>, static_cast<unsigned>(blocks), Shape::kThreads,
                     kSharedBytes, stream, maps, args);
}

template <typename Shape>
bool HaveCode() {
  return IsSm90aCode(reinterpret_cast<const void*>(PrefillSm90Kernel<Shape>));
}

}  // namespace winnow::kernels::internal
