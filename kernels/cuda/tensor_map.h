#pragma once

#include <cuda.h>

#include <cstdint>
#include <span>

#include "absl/status/statusor.h"

namespace winnow::kernels {

// The copy engine's description of a BF16 tensor in device memory. `sizes` and `box`
// are in elements and `strides` in bytes, fastest dimension first and without the
// first's stride. The box's first dimension is 64 elements, stored as 128-byte swizzled
// rows; what lies outside the tensor reads as zero. INTERNAL naming the driver's error.
absl::StatusOr<CUtensorMap> MakeBf16TensorMap(const void* base, std::span<const uint64_t> sizes,
                                              std::span<const uint64_t> strides,
                                              std::span<const uint32_t> box);

// The same of elements of any type, stored as `swizzle` says and brought into the L2 cache by
// `promotion`.
absl::StatusOr<CUtensorMap> MakeTensorMap(CUtensorMapDataType type, CUtensorMapSwizzle swizzle,
                                          CUtensorMapL2promotion promotion, const void* base,
                                          std::span<const uint64_t> sizes,
                                          std::span<const uint64_t> strides,
                                          std::span<const uint32_t> box);

}  // namespace winnow::kernels
