#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/dms_prefill_fp8_consume.cuh"
#include "kernels/cuda/dms_prefill_fp8_produce.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

// Survivors + band on Hopper with FP8 products: blocks, warpgroups and the stream of boxes as in
// dms_prefill_sm90.cuh, the list of a tile's keys as in dms_prefill_fp8_list.cuh, the weights
// as in dms_prefill_fp8_softmax.cuh. A second producer warpgroup rounds the
// queries of tiles to come. The largest exponent of a row is looked for in a tile's first
// boxes, and in a later one only if a weight passes the largest code.
namespace winnow::kernels::internal {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    PrefillFp8Sm90Kernel(const __grid_constant__ PrefillFp8Args args) {
#if WINNOW_SM90A
  extern __shared__ uint8_t memory[];
  const uint32_t misaligned = ptx::SharedAddress(memory) & 127;
  auto& shared = *reinterpret_cast<PrefillFp8Shared<Shape>*>(
      memory + (misaligned == 0 ? 0 : 128 - misaligned));
  // What no copy has written yet meets weights of 0.
  for (uint32_t i = threadIdx.x; i < Shape::kStages * Shape::kValueBytes / 16;
       i += Shape::kThreads) {
    reinterpret_cast<uint4*>(shared.v)[i] = make_uint4(0, 0, 0, 0);
  }
  for (uint32_t i = threadIdx.x; i < Shape::kStages * 2 * kBoxKeys; i += Shape::kThreads) {
    shared.scales[0][i] = 1;
  }
  ptx::FenceForWgmma();
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Shape::kConsumers;
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::BarrierInit(&shared.k_full[i], 1);
      ptx::BarrierInit(&shared.v_full[i], 1);
      ptx::BarrierInit(&shared.k_empty[i], kConsumerWarps * ptx::kWarpArrivals);
      ptx::BarrierInit(&shared.v_empty[i], kConsumerWarps * ptx::kWarpArrivals);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::BarrierInit(&shared.q_full[i], 4 * ptx::kWarpArrivals);
      ptx::BarrierInit(&shared.list_full[i], 1);
      ptx::BarrierInit(&shared.work_full[i], ptx::kWarpArrivals);
      ptx::BarrierInit(&shared.work_empty[i], (kConsumerWarps + 4) * ptx::kWarpArrivals + 2);
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  ptx::WaitForPredecessors();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup < 2) {
    ptx::RegistersDown<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) ProduceFp8<Shape, false>(args, shared);
    if (threadIdx.x == 32) ProduceFp8<Shape, true>(args, shared);
    if (threadIdx.x / 32 == 2) ScheduleFp8<Shape>(args, shared);
    if (warpgroup == 1) QuantizeQueries<Shape>(args, shared);
  } else {
    ptx::RegistersUp<Shape::kConsumerRegisters>();
    ConsumeFp8<Shape>(args, shared, warpgroup - 2);
  }
#endif
}

template <typename Shape>
absl::Status EnqueuePrefillFp8Sm90(const DmsPrefillFp8CudaParams& p, StreamHandle stream) {
  const DmsPrefillBatch& b = p.batch.rows;
  constexpr int kSharedBytes = sizeof(PrefillFp8Shared<Shape>) + 128;
  static_assert(kSharedBytes <= 227 * 1024);
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaFuncSetAttribute(
      PrefillFp8Sm90Kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)));
  WINNOW_ASSIGN_OR_RETURN(const int num_sms, NumSms());
  const int positions = TilePositions(b.head_dim, b.group);
  const float exponent_scale = p.scale * 1.44269504088896340736f * kFp8PerOctave;
  // A row's unit, 2^(exponent - 126), times that: from 2^-9 on, so that shifts are float16.
  const int least = 126 + static_cast<int>(std::ceil(-9.0f - std::log2(exponent_scale)));
  const PrefillFp8Args args{.sequences = b.sequences,
                            .scratch = ScratchOf(b),
                            .band = p.batch.band,
                            .compact = p.batch.compact,
                            .q = p.q,
                            .q_stride = p.q_stride,
                            .out = p.out,
                            .num_kv_heads = b.num_kv_heads,
                            .group = b.group,
                            .window = b.window,
                            .band_rows = b.band_rows,
                            .compact_rows = b.compact_rows,
                            .positions = positions,
                            .exponent_scale = exponent_scale,
                            .least_q_exponent = std::clamp(least, 1, 252)};
  const int blocks = num_sms < MaxTiles(b) ? num_sms : MaxTiles(b);
  return LaunchEarly(PrefillFp8Sm90Kernel<Shape>, static_cast<unsigned>(blocks), Shape::kThreads,
                     kSharedBytes, stream, args);
}

template <typename Shape>
bool HaveFp8Code() {
  return IsSm90aCode(reinterpret_cast<const void*>(PrefillFp8Sm90Kernel<Shape>));
}

}  // namespace winnow::kernels::internal
