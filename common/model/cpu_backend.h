#pragma once

#include "common/base/thread_pool.h"
#include "common/model/backend.h"

namespace winnow {

// The ops on host memory, all under the law of order.
class CpuBackend : public Backend {
 public:
  // `pool` is not owned and must outlive *this.
  explicit CpuBackend(ThreadPool* pool) : pool_(pool) {}

  absl::Status Embedding(const kernels::EmbeddingParams& params) override;
  absl::Status RmsNorm(const kernels::RmsNormParams& params) override;
  absl::Status Gemm(const kernels::GemmParams& params) override;
  absl::Status SwiGlu(const kernels::SwiGluParams& params) override;
  absl::Status DmsLogits(const kernels::DmsLogitsParams& params) override;
  absl::Status DmsCompact(const kernels::DmsCompactParams& params) override;
  absl::Status DmsPrefillAttention(const kernels::DmsPrefillAttentionParams& params) override;
  absl::Status DecodePrepare(const kernels::DecodePrepareParams& params) override;
  absl::Status CompactDecodeAttention(const kernels::CompactDecodeAttentionParams& params) override;

 private:
  ThreadPool* const pool_;
};

}  // namespace winnow
