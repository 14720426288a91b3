#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/cuda_status.h"
#include "common/cuda/stream_handle.h"

namespace winnow::kernels {

// Also of a null pointer.
inline bool Aligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Whether this program's kernels run here with code that can wait for the kernel before
// (sm_90 on). Code compiled for less, as that of the compute_80 PTX on any device, cannot,
// and must not start early. All kernels are built for the same architectures.
inline bool CanWaitForPredecessors(const void* kernel) {
  static const bool can = [kernel] {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }();
  return can;
}

// Whether what runs here of `kernel` is code for sm_90a, not compiled from PTX.
inline bool IsSm90aCode(const void* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
         attributes.binaryVersion == 90;
}

// Enqueues a kernel whose blocks may be placed while the kernel before it in the stream
// runs out, which hides the launch. REQUIRES: before ptx::WaitForPredecessors() a thread touches
// only memory that no kernel that may still run writes, nor reads where this one writes. The kernel
// before may run, and those before that too unless it lets this one start after its own wait.
template <typename... Params, typename... Args>
absl::Status LaunchEarly(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                         StreamHandle stream, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = CanWaitForPredecessors(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

}  // namespace winnow::kernels
