#pragma once

#include "absl/status/status.h"
#include "kernels/cuda/gemv.h"

// The weight-streaming kernels for sm_90a, one for each kind of weights.
namespace winnow::kernels::internal {

// `params` is valid and params.m > 0.
absl::Status EnqueueGemvSm90Bf16(const GemvParams& params, StreamHandle stream);
absl::Status EnqueueGemvSm90E4m3(const GemvParams& params, StreamHandle stream);
// Whether the loaded code of this program has them (not what PTX was compiled from).
bool HaveGemvSm90Code();

}  // namespace winnow::kernels::internal
