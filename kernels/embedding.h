#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/thread_pool.h"
#include "kernels/gemm.h"

namespace winnow::kernels {

// out[t, :] = table[tokens[t], :] as float. The table is the packed matrix
// [vocab, hidden], so tied embeddings need no second copy.
struct EmbeddingParams {
  const PackedMatrix* table = nullptr;  // [vocab, hidden]
  const int32_t* tokens = nullptr;      // [num_tokens], each in [0, vocab)
  float* out = nullptr;                 // [num_tokens, hidden] contiguous
  int num_tokens = 0;                   // >= 0
};

// INVALID_ARGUMENT for a null pointer, a bad shape or a token id outside the table.
absl::Status ValidateEmbedding(const EmbeddingParams& params);
absl::Status EmbeddingCpu(const EmbeddingParams& params, ThreadPool* pool);

}  // namespace winnow::kernels
