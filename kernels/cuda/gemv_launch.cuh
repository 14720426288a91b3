#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/gemv_copies.cuh"

namespace winnow::kernels::internal {

// As many clusters of `blocks` blocks as the current device runs at once, an SM a block.
// `known` is that device's, or null, and its first use prepares the kernel there.
template <typename Kernel>
absl::StatusOr<int> GemvClusters(Kernel* kernel, const cudaLaunchConfig_t& config, int blocks,
                                 std::atomic<int>* known) {
  int clusters = known != nullptr ? known->load(std::memory_order_relaxed) : 0;
  if (clusters > 0) return clusters;
  WINNOW_RETURN_IF_ERROR(CudaStatus(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kGemvSharedBytes)));
  if (blocks == 1) {
    WINNOW_ASSIGN_OR_RETURN(clusters, NumSms());
  } else {
    // As if it took a whole SM's memory.
    cudaLaunchConfig_t alone = config;
    alone.dynamicSmemBytes = kGemvSharedBytes;
    WINNOW_RETURN_IF_ERROR(CudaStatus(cudaOccupancyMaxActiveClusters(&clusters, kernel, &alone)));
  }
  if (clusters < 1) {
    return absl::InternalError(absl::StrCat("gemv: no cluster of ", blocks, " blocks fits"));
  }
  if (known != nullptr) known->store(clusters, std::memory_order_relaxed);
  return clusters;
}

}  // namespace winnow::kernels::internal
