#include "kernels/dms_compact.h"

#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/bf16.h"
#include "common/base/status_macros.h"
#include "kernels/hadamard.h"
#include "kernels/parallel.h"
#include "kernels/rope.h"

namespace winnow::kernels {
namespace {

// One RMSNorm over a head, in place, float32; the sum of squares runs upwards.
void NormHead(const float* weight, float eps, int head_dim, float* x) {
  float sum = 0.0f;
  for (int d = 0; d < head_dim; ++d) sum += x[d] * x[d];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(head_dim) + eps);
  for (int d = 0; d < head_dim; ++d) x[d] = x[d] * scale * weight[d];
}

bool IsBorrowed(DecisionSource source) {
  return source == DecisionSource::kBorrowedAfterQNorm ||
         source == DecisionSource::kBorrowedBeforeQNorm;
}

void CompactToken(const DmsCompactParams& p, int t) {
  const int head_dim = p.head_dim;
  const int group = p.num_heads / p.num_kv_heads;
  const size_t head_bytes = static_cast<size_t>(head_dim) * sizeof(float);
  const size_t token_bytes = TokenBytes(p.format, head_dim);
  const bool rotated = KvFormatOf(p.format).rotated;
  const int64_t table_row = static_cast<int64_t>(p.positions[t]) * (head_dim / 2);
  const float* cos = p.rope_cos + table_row;
  const float* sin = p.rope_sin + table_row;
  const float* q_in = p.q + t * p.q_stride;
  float* q = p.q_out + static_cast<int64_t>(t) * p.num_heads * head_dim;
  if (q != q_in) std::memcpy(q, q_in, head_bytes * static_cast<size_t>(p.num_heads));
  uint8_t* decisions =
      p.decisions == nullptr ? nullptr : p.decisions + static_cast<int64_t>(t) * p.num_kv_heads;

  for (int h = 0; h < p.num_heads; ++h) {
    float* x = q + static_cast<int64_t>(h) * head_dim;
    const bool first_of_group = h % group == 0;
    float u = x[head_dim - 1];
    if (p.q_norm != nullptr) NormHead(p.q_norm, p.norm_eps, head_dim, x);
    if (p.rule.source == DecisionSource::kBorrowedAfterQNorm) u = x[head_dim - 1];
    if (first_of_group && decisions != nullptr && IsBorrowed(p.rule.source)) {
      if (p.rule.round_to_bf16) u = RoundToBf16(u);
      decisions[h / group] = p.rule.Evicts(u) ? 1 : 0;
    }
    const bool zero = first_of_group && p.rule.zeroing != ChannelZeroing::kNone;
    if (zero) x[head_dim - 1] = 0.0f;
    ApplyRope(cos, sin, head_dim, x);
    if (zero && p.rule.zeroing == ChannelZeroing::kBeforeAndAfterRope) x[head_dim - 1] = 0.0f;
    if (rotated) HadamardRotate(head_dim, x);
  }
  for (int g = 0; g < p.num_kv_heads; ++g) {
    float k[kMaxHeadDim];
    std::memcpy(k, p.k + t * p.k_stride + static_cast<int64_t>(g) * head_dim, head_bytes);
    if (p.k_norm != nullptr) NormHead(p.k_norm, p.norm_eps, head_dim, k);
    ApplyRope(cos, sin, head_dim, k);
    const float* v = p.v + t * p.v_stride + static_cast<int64_t>(g) * head_dim;
    float rotated_v[kMaxHeadDim];
    if (rotated) {
      HadamardRotate(head_dim, k);
      std::memcpy(rotated_v, v, head_bytes);
      HadamardRotate(head_dim, rotated_v);
      v = rotated_v;
    }
    const int64_t row = static_cast<int64_t>(t) * p.num_kv_heads + g;
    StoreRow(p.format, head_dim, k, v, p.rows + row * static_cast<int64_t>(token_bytes));
  }
  if (decisions == nullptr) return;
  for (int g = 0; g < p.num_kv_heads; ++g) {
    if (p.rule.source == DecisionSource::kNone) decisions[g] = 0;
    if (p.rule.source == DecisionSource::kLogits) {
      decisions[g] = p.rule.Evicts(p.logit_inputs[t * p.logit_stride + g]) ? 1 : 0;
    }
    if (p.rule.per_layer) decisions[g] = decisions[0];
  }
}

}  // namespace

absl::Status ValidateDmsCompact(const DmsCompactParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateHeadDim(p.head_dim));
  if (p.num_tokens < 0 || p.num_heads < 1 || p.num_kv_heads < 1 ||
      p.num_heads % p.num_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("dms_compact: num_tokens=", p.num_tokens,
                                                   " num_heads=", p.num_heads,
                                                   " num_kv_heads=", p.num_kv_heads));
  }
  const auto null = [](const char* field) {
    return absl::InvalidArgumentError(absl::StrCat("dms_compact: ", field, " is null"));
  };
  if (p.q == nullptr) return null("q");
  if (p.k == nullptr) return null("k");
  if (p.v == nullptr) return null("v");
  if (p.positions == nullptr) return null("positions");
  if (p.rope_cos == nullptr || p.rope_sin == nullptr) return null("rope_cos or rope_sin");
  if (p.q_out == nullptr) return null("q_out");
  if (p.rows == nullptr) return null("rows");
  if (p.rule.source == DecisionSource::kLogits && p.decisions != nullptr &&
      p.logit_inputs == nullptr) {
    return null("logit_inputs");
  }
  for (int t = 0; t < p.num_tokens; ++t) {
    if (p.positions[t] < 0 || p.positions[t] >= p.num_positions) {
      return absl::InvalidArgumentError(absl::StrCat("dms_compact: position=", p.positions[t],
                                                     " is outside [0, ", p.num_positions, ")"));
    }
  }
  return absl::OkStatus();
}

absl::Status DmsCompactCpu(const DmsCompactParams& params, ThreadPool* pool) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsCompact(params));
  ParallelRange(pool, params.num_tokens, 8, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) CompactToken(params, t);
  });
  return absl::OkStatus();
}

}  // namespace winnow::kernels
