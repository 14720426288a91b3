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

inline constexpr int kRememberedDevices = 16;  // beyond, nothing is

inline absl::StatusOr<int> CurrentDevice() {
  int device = 0;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device)));
  return device;
}

// Of the current device, which is asked once.
template <cudaDeviceAttr kAttribute>
absl::StatusOr<int> DeviceAttribute() {
  static std::atomic<int> known[kRememberedDevices];
  WINNOW_ASSIGN_OR_RETURN(const int device, CurrentDevice());
  int value = device < kRememberedDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (value > 0) return value;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaDeviceGetAttribute(&value, kAttribute, device)));
  if (device < kRememberedDevices) known[device].store(value, std::memory_order_relaxed);
  return value;
}
inline absl::StatusOr<int> NumSms() { return DeviceAttribute<cudaDevAttrMultiProcessorCount>(); }
// Bytes of shared memory that a block gets if it asks.
inline absl::StatusOr<int> SharedBytesLimit() {
  return DeviceAttribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
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
