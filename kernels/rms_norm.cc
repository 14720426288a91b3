#include "kernels/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_path.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rms_norm.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/vec_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow::kernels {
namespace HWY_NAMESPACE {

// The sum of squares in 16 interleaved sums and a fixed tree.
float SumOfSquares(const float* x, int n) {
  constexpr int kSums = 16;
  const hn::CappedTag<float, kSums> d;
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(d));
  constexpr int kVecs = kSums / kLanes;
  hn::Vec<decltype(d)> acc[kVecs];
  for (auto& a : acc) a = hn::Zero(d);
  int i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int v = 0; v < kVecs; ++v) {
      const auto value = hn::LoadU(d, x + i + v * kLanes);
      acc[v] = hn::MulAdd(value, value, acc[v]);
    }
  }
  float sums[kSums];
  for (int v = 0; v < kVecs; ++v) hn::StoreU(acc[v], d, sums + v * kLanes);
  for (; i < n; ++i) sums[i % kSums] += x[i] * x[i];
  for (int step = kSums / 2; step > 0; step /= 2) {
    for (int s = 0; s < step; ++s) sums[s] += sums[s + step];
  }
  return sums[0];
}

void RmsNormRows(const RmsNormParams& params, int begin, int end) {
  const hn::CappedTag<float, 16> d;
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(d));
  const int n = params.n;
  for (int row = begin; row < end; ++row) {
    const float* x = params.x + row * params.ldx;
    Bf16* out_bf16 = params.out_bf16 ? params.out_bf16 + int64_t{row} * n : nullptr;
    float* out_f32 = params.out_f32 ? params.out_f32 + int64_t{row} * n : nullptr;
    const float mean = SumOfSquares(x, n) / static_cast<float>(n);
    const float inverse = 1.0f / std::sqrt(mean + params.eps);
    const auto factor = hn::Set(d, inverse);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const auto scaled = hn::Mul(hn::LoadU(d, x + i), factor);
      const auto value = hn::Mul(scaled, hn::LoadU(d, params.weight + i));
      if (out_bf16) StoreBf16(d, value, out_bf16 + i);
      if (out_f32) hn::StoreU(value, d, out_f32 + i);
    }
    for (; i < n; ++i) {
      const float value = x[i] * inverse * params.weight[i];
      if (out_bf16) out_bf16[i] = ToBf16(value);
      if (out_f32) out_f32[i] = value;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow::kernels {

HWY_EXPORT(RmsNormRows);

absl::Status ValidateRmsNorm(const RmsNormParams& params) {
  if (params.x == nullptr || params.weight == nullptr) {
    return absl::InvalidArgumentError("rms_norm: x or weight is null");
  }
  if (params.out_bf16 == nullptr && params.out_f32 == nullptr) {
    return absl::InvalidArgumentError("rms_norm: no output is set");
  }
  if (params.m < 0 || params.n < 1 || params.ldx < params.n) {
    return absl::InvalidArgumentError(
        absl::StrCat("rms_norm: bad shape m=", params.m, " n=", params.n, " ldx=", params.ldx));
  }
  return absl::OkStatus();
}

absl::Status RmsNormCpu(const RmsNormParams& params, ThreadPool* pool) {
  if (absl::Status status = ValidateRmsNorm(params); !status.ok()) return status;
  ActiveCpuPath();  // caps the dispatch below
  const int grain = std::max(1, (32 << 10) / params.n);
  pool->ParallelFor(params.m, grain, [&](int begin, int end) {
    HWY_DYNAMIC_DISPATCH(RmsNormRows)(params, begin, end);
  });
  return absl::OkStatus();
}

}  // namespace winnow::kernels
#endif
