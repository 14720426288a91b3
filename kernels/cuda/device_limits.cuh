#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"

// What the current device has, and the refusal of what it has not.
namespace winnow::kernels {

inline absl::StatusOr<int> DeviceAttribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device)));
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaDeviceGetAttribute(&value, attribute, device)));
  return value;
}

// Bytes of shared memory that a block gets if it asks. The device is asked once.
inline absl::StatusOr<int> SharedBytesLimit() {
  constexpr int kDevices = 16;
  static std::atomic<int> known[kDevices];
  int device = 0;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device)));
  int limit = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (limit > 0) return limit;
  WINNOW_ASSIGN_OR_RETURN(limit, DeviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  if (device < kDevices) known[device].store(limit, std::memory_order_relaxed);
  return limit;
}

// UNIMPLEMENTED, in the name of `op`, if a block needs `bytes` of shared memory, static and
// dynamic, because `field` is `value`, and gets `limit` at most.
inline absl::Status CheckSharedBytes(const char* op, const char* field, int value, int64_t bytes,
                                     int64_t limit) {
  if (bytes <= limit) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat(op, ": ", field, "=", value, " needs ", bytes,
                   " bytes of shared memory a block, and the device has ", limit));
}

}  // namespace winnow::kernels
