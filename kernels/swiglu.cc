#include "kernels/swiglu.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_path.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/swiglu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/vec_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow::kernels {
namespace HWY_NAMESPACE {

void SwiGluRows(const SwiGluParams& params, int begin, int end) {
  const hn::CappedTag<float, 16> d;
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(d));
  const int n = params.intermediate;
  for (int row = begin; row < end; ++row) {
    const float* gate = params.x + row * params.ldx;
    const float* up = gate + n;
    Bf16* out_bf16 = params.out_bf16 ? params.out_bf16 + int64_t{row} * n : nullptr;
    float* out_f32 = params.out_f32 ? params.out_f32 + int64_t{row} * n : nullptr;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const auto value = hn::Mul(Silu(d, hn::LoadU(d, gate + i)), hn::LoadU(d, up + i));
      if (out_bf16) StoreBf16(d, value, out_bf16 + i);
      if (out_f32) hn::StoreU(value, d, out_f32 + i);
    }
    if (i == n) continue;
    // The tail takes the same vector code, on a padded copy.
    float tail[2][kLanes] = {};
    std::copy(gate + i, gate + n, tail[0]);
    std::copy(up + i, up + n, tail[1]);
    const auto value = hn::Mul(Silu(d, hn::LoadU(d, tail[0])), hn::LoadU(d, tail[1]));
    hn::StoreU(value, d, tail[0]);
    for (int j = 0; i < n; ++i, ++j) {
      if (out_bf16) out_bf16[i] = ToBf16(tail[0][j]);
      if (out_f32) out_f32[i] = tail[0][j];
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow::kernels {

HWY_EXPORT(SwiGluRows);

absl::Status ValidateSwiGlu(const SwiGluParams& params) {
  if (params.x == nullptr) return absl::InvalidArgumentError("swiglu: x is null");
  if (params.out_bf16 == nullptr && params.out_f32 == nullptr) {
    return absl::InvalidArgumentError("swiglu: no output is set");
  }
  if (params.m < 0 || params.intermediate < 1 || params.ldx < 2 * int64_t{params.intermediate}) {
    return absl::InvalidArgumentError(absl::StrCat("swiglu: bad shape m=", params.m,
                                                   " intermediate=", params.intermediate,
                                                   " ldx=", params.ldx));
  }
  return absl::OkStatus();
}

absl::Status SwiGluCpu(const SwiGluParams& params, ThreadPool* pool) {
  if (absl::Status status = ValidateSwiGlu(params); !status.ok()) return status;
  ActiveCpuPath();  // caps the dispatch below
  const int grain = std::max(1, (16 << 10) / params.intermediate);
  pool->ParallelFor(params.m, grain, [&](int begin, int end) {
    HWY_DYNAMIC_DISPATCH(SwiGluRows)(params, begin, end);
  });
  return absl::OkStatus();
}

}  // namespace winnow::kernels
#endif
