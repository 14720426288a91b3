#pragma once

#include <cuda_runtime.h>

#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/dms_prefill_fp8_consume.cuh"
#include "kernels/cuda/dms_prefill_fp8_plan.cuh"
#include "kernels/cuda/dms_prefill_fp8_produce.cuh"
#include "kernels/cuda/ptx.cuh"

// The FP8 prefill kernel: dms_prefill_fp8_produce.cuh says how.
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
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kStages * Shape::kBoxBytes / 16;
       i += Shape::kThreads) {
    reinterpret_cast<uint4*>(shared.v)[i] = make_uint4(0, 0, 0, 0);
  }
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kStages * Shape::kBoxKeys;
       i += Shape::kThreads) {
    shared.inverses[0][i] = 0.0f;
  }
  ptx::FenceForWgmma();
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Shape::kConsumers;
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::BarrierInit(&shared.k_full[i], 1);
      ptx::BarrierInit(&shared.v_full[i], 1);
      ptx::BarrierInit(&shared.k_empty[i], kConsumerWarps);
      ptx::BarrierInit(&shared.v_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::BarrierInit(&shared.work_full[i], 1);
      ptx::BarrierInit(&shared.work_empty[i], kConsumerWarps);
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (warpgroup == 0) {
    ptx::RegistersDown<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) ProduceFp8<Shape>(args, shared);
  } else {
    ptx::RegistersUp<Shape::kConsumerRegisters>();
    Fp8Consumer<Shape>(args, shared, warpgroup - 1).Run();
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
  int device = 0, num_sms = 0;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device)));
  WINNOW_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device)));
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
                            .positions = Fp8TilePositions(b.group),
                            .scale_log2 = p.scale * 1.44269504088896340736f};
  const int blocks = num_sms < MaxFp8Tiles(b) ? num_sms : MaxFp8Tiles(b);
  PrefillFp8Sm90Kernel<Shape>
      <<<static_cast<unsigned>(blocks), Shape::kThreads, kSharedBytes, stream>>>(args);
  return CudaStatus(cudaGetLastError());
}

template <typename Shape>
bool HaveFp8Code() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, PrefillFp8Sm90Kernel<Shape>) == cudaSuccess &&
         attributes.ptxVersion >= 90 && attributes.binaryVersion == 90;
}

}  // namespace winnow::kernels::internal
