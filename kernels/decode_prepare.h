#pragma once

#include "absl/status/status.h"
#include "common/base/thread_pool.h"
#include "kernels/dms_compact.h"
#include "kernels/kv_span.h"

namespace winnow::kernels {

// One token of each of a batch of sequences: what DmsCompact does, then the
// token enters its spans (ring and survivors advance by one).
struct DecodePrepareParams {
  DmsCompactParams compact;      // num_tokens = sequences; rows and decisions are scratch here
  KvLayout layout;               // format and head_dim as in compact
  Span* const* spans = nullptr;  // [num_tokens]: each sequence's spans of this layer,
                                 // [num_kv_heads]; pages for one token attached; all distinct
};

// As ValidateDmsCompact, and INVALID_ARGUMENT where layout and compact differ,
// or decisions is null though the layout has a window and rule.source is not kNone.
absl::Status ValidateDecodePrepare(const DecodePrepareParams& params);
absl::Status DecodePrepareCpu(const DecodePrepareParams& params, ThreadPool* pool);

}  // namespace winnow::kernels
