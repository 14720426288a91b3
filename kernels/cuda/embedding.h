#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"

namespace winnow::kernels {

// EmbeddingCpu() with a row-major table: out[t, :] = table[tokens[t], :] as float, exactly.
// A token id outside [0, vocab), which the CPU refuses, gives a row of NaN: ids are device
// memory, and a sampler that failed says so by a negative one.
struct EmbeddingCudaParams {
  const Bf16* table = nullptr;      // device [vocab, hidden] contiguous
  const int32_t* tokens = nullptr;  // device [num_tokens]
  float* out = nullptr;             // device [num_tokens, hidden] contiguous
  int num_tokens = 0;               // >= 0
  int vocab = 0, hidden = 0;        // >= 1
};

// INVALID_ARGUMENT for a null pointer or a bad shape.
absl::Status ValidateEmbeddingCuda(const EmbeddingCudaParams& params);
absl::Status LaunchEmbedding(const EmbeddingCudaParams& params, StreamHandle stream);

}  // namespace winnow::kernels
