#include "kernels/embedding.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace winnow::kernels {

absl::Status ValidateEmbedding(const EmbeddingParams& params) {
  if (params.table == nullptr || params.table->data() == nullptr) {
    return absl::InvalidArgumentError("embedding: table is null or empty");
  }
  if (params.tokens == nullptr || params.out == nullptr) {
    return absl::InvalidArgumentError("embedding: tokens or out is null");
  }
  if (params.num_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("embedding: num_tokens=", params.num_tokens, " < 0"));
  }
  for (int t = 0; t < params.num_tokens; ++t) {
    if (params.tokens[t] < 0 || params.tokens[t] >= params.table->n()) {
      return absl::InvalidArgumentError(absl::StrCat("embedding: tokens[", t,
                                                     "]=", params.tokens[t], " is outside [0, ",
                                                     params.table->n(), ")"));
    }
  }
  return absl::OkStatus();
}

absl::Status EmbeddingCpu(const EmbeddingParams& params, ThreadPool* pool) {
  if (absl::Status status = ValidateEmbedding(params); !status.ok()) return status;
  const int hidden = params.table->k();
  const int grain = std::max(1, (32 << 10) / hidden);
  pool->ParallelFor(params.num_tokens, grain, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      params.table->Row(params.tokens[t], params.out + int64_t{t} * hidden);
    }
  });
  return absl::OkStatus();
}

}  // namespace winnow::kernels
