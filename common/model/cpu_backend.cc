#include "common/model/cpu_backend.h"

namespace winnow {

absl::Status CpuBackend::Embedding(const kernels::EmbeddingParams& params) {
  return kernels::EmbeddingCpu(params, pool_);
}

absl::Status CpuBackend::RmsNorm(const kernels::RmsNormParams& params) {
  return kernels::RmsNormCpu(params, pool_);
}

absl::Status CpuBackend::Gemm(const kernels::GemmParams& params) {
  return kernels::GemmCpu(params, pool_);
}

absl::Status CpuBackend::SwiGlu(const kernels::SwiGluParams& params) {
  return kernels::SwiGluCpu(params, pool_);
}

absl::Status CpuBackend::DmsLogits(const kernels::DmsLogitsParams& params) {
  return kernels::DmsLogitsCpu(params, pool_);
}

absl::Status CpuBackend::DmsCompact(const kernels::DmsCompactParams& params) {
  return kernels::DmsCompactCpu(params, pool_);
}

absl::Status CpuBackend::DmsPrefillAttention(const kernels::DmsPrefillAttentionParams& params) {
  return kernels::DmsPrefillAttentionCpu(params, pool_);
}

absl::Status CpuBackend::DecodePrepare(const kernels::DecodePrepareParams& params) {
  return kernels::DecodePrepareCpu(params, pool_);
}

absl::Status CpuBackend::CompactDecodeAttention(
    const kernels::CompactDecodeAttentionParams& params) {
  return kernels::CompactDecodeAttentionCpu(params, pool_);
}

}  // namespace winnow
