#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/device_spans.h"
#include "kernels/dms_compact.h"

namespace winnow::kernels {

// What DecodePrepareCpu does, of one layer, after LaunchDecodeStep has advanced the counters
// and taken pages: q/k norm, decision, zeroing, RoPE, rotation, then the old newest token
// moves into the ring (or the survivors), the ring's oldest into the survivors, and the new
// token's K and V, in stored form, become the newest. All bits are the CPU's.
struct DecodePrepareCudaParams {
  // As for the CPU with num_tokens sequences, pointers to device memory; `format` and
  // `head_dim` those of spans. `rows` is not used; `decisions` may be null; `q_out` must not
  // be `q`.
  DmsCompactParams compact;
  DeviceSpans spans;
  const int32_t* slots = nullptr;  // device [num_tokens], as in DecodeStepParams
  int layer = 0;
};

// INVALID_ARGUMENT for a null pointer or a bad shape; UNIMPLEMENTED for a head_dim other
// than 64 and 128. Positions are device memory and not looked at: REQUIRES that they are in
// [0, num_positions).
absl::Status ValidateDecodePrepare(const DecodePrepareCudaParams& params);
absl::Status LaunchDecodePrepare(const DecodePrepareCudaParams& params, StreamHandle stream);

}  // namespace winnow::kernels
