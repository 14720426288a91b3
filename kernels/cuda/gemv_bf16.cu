#include "kernels/cuda/gemv_bf16_sm90.cuh"
#include "kernels/cuda/launch.cuh"

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
  return IsSm90aCode(reinterpret_cast<const void*>(GemvBf16Kernel<1, false>));
}

}  // namespace winnow::kernels::internal
