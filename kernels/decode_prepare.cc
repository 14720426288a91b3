#include "kernels/decode_prepare.h"

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/parallel.h"

namespace winnow::kernels {

absl::Status ValidateDecodePrepare(const DecodePrepareParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsCompact(p.compact));
  if (p.layout.format != p.compact.format || p.layout.head_dim != p.compact.head_dim) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_prepare: layout is ", std::string(KvFormatName(p.layout.format)),
                     " with head_dim=", p.layout.head_dim, ", compact ",
                     std::string(KvFormatName(p.compact.format)), " with ", p.compact.head_dim));
  }
  if (p.spans == nullptr && p.compact.num_tokens > 0) {
    return absl::InvalidArgumentError("decode_prepare: spans is null");
  }
  if (p.compact.rule.source != DecisionSource::kNone && p.layout.window > 0 &&
      p.compact.decisions == nullptr) {
    return absl::InvalidArgumentError("decode_prepare: decisions is null");
  }
  return absl::OkStatus();
}

absl::Status DecodePrepareCpu(const DecodePrepareParams& params, ThreadPool* pool) {
  WINNOW_RETURN_IF_ERROR(ValidateDecodePrepare(params));
  const DmsCompactParams& c = params.compact;
  WINNOW_RETURN_IF_ERROR(DmsCompactCpu(c, pool));
  const int64_t token_bytes = static_cast<int64_t>(TokenBytes(c.format, c.head_dim));
  for (int s = 0; s < c.num_tokens; ++s) {
    for (int g = 0; g < c.num_kv_heads; ++g) {
      const int64_t at = static_cast<int64_t>(s) * c.num_kv_heads + g;
      const uint8_t evict = c.decisions == nullptr ? 0 : c.decisions[at];
      AdvanceSpan(params.layout, &params.spans[s][g], c.rows + at * token_bytes, evict);
    }
  }
  return absl::OkStatus();
}

}  // namespace winnow::kernels
