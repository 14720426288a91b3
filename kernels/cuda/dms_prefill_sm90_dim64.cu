#include "kernels/cuda/dms_prefill_sm90.cuh"

namespace winnow::kernels::internal {

absl::Status EnqueuePrefillSm90Dim64(const DmsPrefillCudaParams& params, StreamHandle stream) {
  return EnqueuePrefillSm90<PrefillShape<64>>(params, stream);
}

}  // namespace winnow::kernels::internal
