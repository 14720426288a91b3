#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/compact_decode_consumer.cuh"
#include "kernels/cuda/compact_decode_merge.cuh"
#include "kernels/cuda/compact_decode_producer.cuh"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/launch.cuh"

// The kernel of compact_decode_attention; one file an instantiation includes this.
//
// Two blocks an SM, each of kDecodeWarps consumer warps, kMergeWarps merging ones and a
// producer; a block takes pieces (or whole spans) of the plan, its first two by index, the
// rest from a counter. The producer copies their pages one after another into a ring in
// shared memory, as far ahead as it is long. Of a piece's pages consumer w takes w,
// w + kDecodeWarps, ...; the merging warps add the consumers' results, the pieces of a whole
// span, and, in the block that brings a span's last piece, those of the others, always in
// index order. No warp waits for another but through the barriers of what it reads.
namespace winnow::kernels::device {

// The part of warp `warp` of `warps`. One lane: a warp's lanes would take turns.
template <typename Shared>
__device__ __forceinline__ void InitBarriers(Shared& shared, int ring_slots, int warp, int warps) {
  for (int i = warp; i < ring_slots; i += warps) {
    RingBarrierInit(&shared.full[i], kFillArrivals);
    RingBarrierInit(&shared.empty[i], ptx::kWarpArrivals);
  }
  for (int i = warp; i < Shared::kStages; i += warps) {
    RingBarrierInit(&shared.words_full[i], 32);
    RingBarrierInit(&shared.query_full[i], 32);
    RingBarrierInit(&shared.piece_empty[i], (kDecodeWarps + kMergeWarps) * ptx::kWarpArrivals);
  }
  if (warp == 0) {
    RingBarrierInit(&shared.results_full, kDecodeWarps * ptx::kWarpArrivals);
    RingBarrierInit(&shared.results_empty, kMergeWarps * ptx::kWarpArrivals);
    RingBarrierInit(&shared.gathered, 1);
  }
}

template <KvElement kK, KvElement kV, int kDim, int kHeads>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    CompactDecodeKernel(const __grid_constant__ CUtensorMap map,
                        const __grid_constant__ CompactDecodeArgs args) {
  using Shared = DecodeShared<kK, kV, kDim, kHeads>;
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory + Shared::RingBytes(args.ring_slots));
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (!Shared::kLateDependents) ptx::LetDependentsStart();
#ifdef WINNOW_RACECHECK
  // It records writes that other warps skip by a uniform predicate; here they skip by a branch.
  if (warp == 0) {
    if (lane == 0) InitBarriers(shared, args.ring_slots, 0, 1);
    __syncwarp();
  }
#else
  if (lane == 0) InitBarriers(shared, args.ring_slots, warp, kDecodeThreads / 32);
#endif
#if WINNOW_SM90A
  ptx::FenceBarrierInit();
#endif
  __syncthreads();
#if WINNOW_SM90A
  if (args.gather_slots > 0) ptx::ClusterArriveRelaxed();
#endif
  if (warp == kDecodeWarps + kMergeWarps) {
    DecodeProducer<kK, kV, kDim, kHeads>(args, &map, memory, shared, lane).Run();
  } else if (warp >= kDecodeWarps) {
    if (warp == kDecodeWarps + kMergeWarps - 1) {  // idle for now
      DecodeProducer<kK, kV, kDim, kHeads>(args, &map, memory, shared, lane).BeginWritten();
    }
    FinishPieces<kK, kV, kDim, kHeads>(args, shared, warp - kDecodeWarps, lane);
  } else {
    DecodeConsumer<kK, kV, kDim, kHeads>(args, memory, shared, warp, lane).Run();
  }
}

struct DecodeLaunch {
  CUtensorMap map;  // the pages' bytes as rows of 128 bytes
  int num_rows;
  int max_blocks;  // more would find no piece
  bool overlap;
};

// Clusters that the current device runs at once; `known` is that, once it was asked, or null.
template <typename Kernel>
absl::StatusOr<int> ClustersAtOnce(Kernel* kernel, const cudaLaunchConfig_t& config,
                                   std::atomic<int>* known) {
  int clusters = known != nullptr ? known->load(std::memory_order_relaxed) : 0;
  if (clusters > 0) return clusters;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)));
  if (clusters < 1) {
    return absl::InternalError("compact_decode_attention: no cluster of blocks fits");
  }
  if (known != nullptr) known->store(clusters, std::memory_order_relaxed);
  return clusters;
}

template <KvElement kK, KvElement kV, int kDim, int kHeads>
absl::Status LaunchHeads(CompactDecodeArgs args, const DecodeLaunch& launch, cudaStream_t stream) {
  using Shared = DecodeShared<kK, kV, kDim, kHeads>;
  static std::atomic<int> known[kRememberedDevices][kMaxClusterBlocks + 1];
  WINNOW_ASSIGN_OR_RETURN(const int device, CurrentDevice());
  WINNOW_ASSIGN_OR_RETURN(const int num_sms, NumSms());
  WINNOW_ASSIGN_OR_RETURN(const int sm_bytes,
                          DeviceAttribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>());
  WINNOW_ASSIGN_OR_RETURN(const int block_bytes, SharedBytesLimit());
  auto* kernel = CompactDecodeKernel<kK, kV, kDim, kHeads>;
  const bool sm90 = CanWaitForPredecessors(reinterpret_cast<const void*>(kernel));
  const int cluster = sm90 ? DecodeClusterBlocks(launch.num_rows) : 1;
  args.gather_slots = GatherSlots(kHeads, cluster);
  // The ring takes what is left of half an SM, of which each block costs 1 KB more; of a
  // whole one where that is too little.
  const int other_bytes = static_cast<int>(sizeof(Shared) + GatherBytes<kDim>(args.gather_slots));
  const auto slots_in = [other_bytes](int bytes) {
    const int left = bytes - other_bytes;
    return left < 0 ? 0 : left / static_cast<int>(Shared::RingBytes(1));
  };
  int blocks_per_sm = 2;
  int slots = slots_in(std::min(sm_bytes / 2 - 1024, block_bytes));
  if (slots < Shared::kMinRing) {
    blocks_per_sm = 1;
    slots = slots_in(block_bytes);
  }
  args.ring_slots = std::min(slots, Shared::kMaxRing);
  if (args.ring_slots < Shared::kMinRing) {
    return absl::UnimplementedError(
        absl::StrCat("compact_decode_attention: ", block_bytes, " bytes of shared memory a block"));
  }
  const size_t bytes = Shared::RingBytes(args.ring_slots) + static_cast<size_t>(other_bytes);
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))));
  int grid = std::min(num_sms * blocks_per_sm, launch.max_blocks);
  cudaLaunchAttribute attributes[3] = {};
  unsigned num_attributes = 0;
  if (cluster > 1) {
    attributes[num_attributes].id = cudaLaunchAttributeClusterDimension;
    attributes[num_attributes++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    // Else more SMs get two blocks while others have none.
    attributes[num_attributes].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[num_attributes++].val.clusterSchedulingPolicyPreference =
        cudaClusterSchedulingPolicyLoadBalancing;
  }
  if (launch.overlap && sm90) {
    attributes[num_attributes].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[num_attributes++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  if (cluster > 1) {
    // A block each for the shares, or as many as there are at once for pieces.
    config.gridDim = dim3(static_cast<unsigned>(cluster));
    WINNOW_ASSIGN_OR_RETURN(
        const int clusters,
        ClustersAtOnce(kernel, config,
                       device < kRememberedDevices ? &known[device][cluster] : nullptr));
    grid = std::max(std::min(grid / cluster, clusters), launch.num_rows) * cluster;
  }
  config.gridDim = dim3(static_cast<unsigned>(grid));
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, launch.map, args));
}

template <KvElement kK, KvElement kV, int kDim>
absl::Status LaunchCompactDecode(const CompactDecodeArgs& args, const DecodeLaunch& launch,
                                 cudaStream_t stream) {
  return args.group <= 4 ? LaunchHeads<kK, kV, kDim, 4>(args, launch, stream)
                         : LaunchHeads<kK, kV, kDim, 8>(args, launch, stream);
}

}  // namespace winnow::kernels::device
