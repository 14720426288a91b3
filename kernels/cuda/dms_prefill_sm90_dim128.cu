#include "kernels/cuda/dms_prefill_sm90.cuh"

namespace winnow::kernels::internal {

absl::Status EnqueuePrefillSm90Dim128(const DmsPrefillCudaParams& params, StreamHandle stream) {
  return EnqueuePrefillSm90<PrefillShape<128>>(params, stream);
}

bool HaveSm90Code() { return HaveCode<PrefillShape<128>>(); }

}  // namespace winnow::kernels::internal
