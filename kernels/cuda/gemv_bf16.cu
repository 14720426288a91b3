#include "kernels/cuda/gemv_bf16_sm90.cuh"

namespace winnow::kernels::internal {

absl::Status EnqueueGemvSm90Bf16(const GemvParams& params, StreamHandle stream) {
  const GemvBf16Args args = GemvBf16ArgsOf(params);
  if (params.k > kGemvSlice) {
    return params.m <= 8 ? EnqueueGemvBf16<1, true>(args, stream)
                         : EnqueueGemvBf16<2, true>(args, stream);
  }
  return params.m <= 8 ? EnqueueGemvBf16<1, false>(args, stream)
                       : EnqueueGemvBf16<2, false>(args, stream);
}

bool HaveGemvSm90Code() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, GemvBf16Kernel<1, false>) == cudaSuccess &&
         attributes.ptxVersion >= 90 && attributes.binaryVersion == 90;
}

}  // namespace winnow::kernels::internal
