#include "kernels/dms_logits.h"

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace winnow::kernels {
namespace {

constexpr int kLanes = 16;
constexpr int kRowsPerPiece = 8;

float Dot(const float* x, const float* w, int n) {
  float sums[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane] * w[i + lane];
  }
  for (int lane = 0; i + lane < n; ++lane) sums[lane] += x[i + lane] * w[i + lane];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

}  // namespace

absl::Status ValidateDmsLogits(const DmsLogitsParams& p) {
  if (p.m < 0 || p.hidden < 1 || p.num_kv_heads < 1) {
    return absl::InvalidArgumentError(absl::StrCat("dms_logits: m=", p.m, " hidden=", p.hidden,
                                                   " num_kv_heads=", p.num_kv_heads));
  }
  if (p.x == nullptr || p.weight == nullptr || p.out == nullptr) {
    return absl::InvalidArgumentError("dms_logits: x, weight or out is null");
  }
  return absl::OkStatus();
}

absl::Status DmsLogitsCpu(const DmsLogitsParams& p, ThreadPool* pool) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsLogits(p));
  const auto run = [&p](int begin, int end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < p.num_kv_heads; ++g) {
        const float sum = Dot(p.x + row * p.hidden, p.weight + g * p.hidden, p.hidden);
        p.out[row * p.num_kv_heads + g] = p.bias == nullptr ? sum : sum + p.bias[g];
      }
    }
  };
  if (pool == nullptr) {
    run(0, p.m);
  } else {
    pool->ParallelFor(p.m, kRowsPerPiece, run);
  }
  return absl::OkStatus();
}

}  // namespace winnow::kernels
