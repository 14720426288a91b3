#include "kernels/cuda/gemv_sm90.cuh"

namespace winnow::kernels::internal {

absl::Status EnqueueGemvSm90E4m3(const GemvParams& params, StreamHandle stream) {
  return params.m <= 8 ? EnqueueGemvSm90<1>(params, stream) : EnqueueGemvSm90<2>(params, stream);
}

}  // namespace winnow::kernels::internal
