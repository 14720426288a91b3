#pragma once

#include "absl/status/status.h"
#include "kernels/compact_decode_attention.h"
#include "kernels/decode_prepare.h"
#include "kernels/dms_compact.h"
#include "kernels/dms_logits.h"
#include "kernels/dms_prefill_attention.h"
#include "kernels/embedding.h"
#include "kernels/gemm.h"
#include "kernels/rms_norm.h"
#include "kernels/swiglu.h"

namespace winnow {

// Where the ops run: one virtual call an op, each op's contract in its own header.
// Owned by the engine thread.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual absl::Status Embedding(const kernels::EmbeddingParams& params) = 0;
  virtual absl::Status RmsNorm(const kernels::RmsNormParams& params) = 0;
  virtual absl::Status Gemm(const kernels::GemmParams& params) = 0;
  virtual absl::Status SwiGlu(const kernels::SwiGluParams& params) = 0;
  virtual absl::Status DmsLogits(const kernels::DmsLogitsParams& params) = 0;
  virtual absl::Status DmsCompact(const kernels::DmsCompactParams& params) = 0;
  virtual absl::Status DmsPrefillAttention(const kernels::DmsPrefillAttentionParams& params) = 0;
  virtual absl::Status DecodePrepare(const kernels::DecodePrepareParams& params) = 0;
  virtual absl::Status CompactDecodeAttention(
      const kernels::CompactDecodeAttentionParams& params) = 0;
};

}  // namespace winnow
