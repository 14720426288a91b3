#pragma once

#include "absl/status/status.h"
#include "kernels/cuda/dms_prefill.h"

// The prefill kernel for sm_90a: one instantiation a file.
namespace winnow::kernels::internal {

absl::Status EnqueuePrefillSm90Dim64(const DmsPrefillCudaParams& params, StreamHandle stream);
absl::Status EnqueuePrefillSm90Dim128(const DmsPrefillCudaParams& params, StreamHandle stream);
// Whether the loaded code of this program has them (not what PTX was compiled from).
bool HaveSm90Code();

}  // namespace winnow::kernels::internal
