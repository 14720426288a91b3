#include "kernels/cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"

namespace winnow::kernels {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver is reached through the runtime, so that nothing links against it.
Encode FindEncode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(entry)
             : nullptr;
}

}  // namespace

absl::StatusOr<CUtensorMap> MakeBf16TensorMap(const void* base, std::span<const uint64_t> sizes,
                                              std::span<const uint64_t> strides,
                                              std::span<const uint32_t> box) {
  return MakeTensorMap(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, base, sizes, strides, box);
}

absl::StatusOr<CUtensorMap> MakeTensorMap(CUtensorMapDataType type, CUtensorMapSwizzle swizzle,
                                          CUtensorMapL2promotion promotion, const void* base,
                                          std::span<const uint64_t> sizes,
                                          std::span<const uint64_t> strides,
                                          std::span<const uint32_t> box) {
  static const Encode encode = FindEncode();
  if (encode == nullptr) return absl::InternalError("no cuTensorMapEncodeTiled in the driver");
  constexpr uint32_t kSteps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, type, static_cast<uint32_t>(sizes.size()), const_cast<void*>(base), sizes.data(),
             strides.data(), box.data(), kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return absl::InternalError(
        absl::StrCat("cuTensorMapEncodeTiled: error ", static_cast<int>(result)));
  }
  return map;
}

}  // namespace winnow::kernels
