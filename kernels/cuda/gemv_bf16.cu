#include "kernels/cuda/gemv_sm90.cuh"

namespace winnow::kernels::internal {

absl::Status EnqueueGemvSm90Bf16(const GemvParams& params, StreamHandle stream) {
  return params.m <= 8 ? EnqueueGemvSm90<false, 1>(params, stream)
                       : EnqueueGemvSm90<false, 2>(params, stream);
}

bool HaveGemvSm90Code() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, GemvSm90Kernel<false, 1, 8>) == cudaSuccess &&
         attributes.ptxVersion >= 90 && attributes.binaryVersion == 90;
}

}  // namespace winnow::kernels::internal
