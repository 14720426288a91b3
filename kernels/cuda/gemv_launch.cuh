#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/gemv_copies.cuh"

namespace winnow::kernels::internal {

// As many clusters of `config` as the current device runs at once, an SM a block. Asks the device.
template <typename Kernel>
absl::StatusOr<int> GemvClusters(Kernel* kernel, cudaLaunchConfig_t config, int cluster) {
  WINNOW_RETURN_IF_ERROR(CudaStatus(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kGemvSharedBytes)));
  if (cluster == 1) return NumSms();
  config.dynamicSmemBytes = kGemvSharedBytes;  // as if it took a whole SM's
  int clusters = 0;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)));
  if (clusters > 0) return clusters;
  return absl::InternalError(absl::StrCat("gemv: no cluster of ", cluster, " blocks fits"));
}

// Enqueues kKernel, early, in clusters of 1 or 2 blocks: one for each of `tiles`, or as many as run
// at once.
template <auto kKernel, typename... Args>
absl::Status LaunchGemvKernel(int cluster, int tiles, int threads, int shared_bytes,
                              StreamHandle stream, const Args&... args) {
  static std::atomic<int> known[kRememberedDevices][2];
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  WINNOW_ASSIGN_OR_RETURN(const int device, CurrentDevice());
  std::atomic<int>* remembered =
      device < kRememberedDevices ? &known[device][cluster - 1] : nullptr;
  int clusters = remembered != nullptr ? remembered->load(std::memory_order_relaxed) : 0;
  if (clusters == 0) {
    WINNOW_ASSIGN_OR_RETURN(clusters, GemvClusters(kKernel, config, cluster));
    if (remembered != nullptr) remembered->store(clusters, std::memory_order_relaxed);
  }
  config.gridDim.x = static_cast<unsigned>(std::min(clusters, tiles) * cluster);
  return CudaStatus(cudaLaunchKernelEx(&config, kKernel, args...));
}

}  // namespace winnow::kernels::internal
