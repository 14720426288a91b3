#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/silu.cuh"
#include "kernels/cuda/swiglu.h"
#include "kernels/cuda/vector_io.cuh"

namespace winnow::kernels {
namespace {

constexpr int kThreads = 256, kPerThread = 2, kWidest = 8;

// Grid (pieces of a row, rows), block kThreads; rows beyond gridDim.y in turns. In is float or
// Bf16.
template <typename In, int kWidth>
__global__ void __launch_bounds__(kThreads) SwiGluKernel(const In* x, const SwiGluCudaParams p) {
  ptx::WaitForPredecessors();
  const int n = p.intermediate;
  const int first =
      (static_cast<int>(blockIdx.x) * kThreads * kPerThread + static_cast<int>(threadIdx.x)) *
      kWidth;
  for (int64_t row = blockIdx.y; row < p.m; row += gridDim.y) {
    const In* gate = x + row * p.ldx;
    device::Floats<kWidth> g[kPerThread], u[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = first + i * kThreads * kWidth;
      if (at >= n) continue;
      g[i] = device::Load<kWidth>(gate + at);
      u[i] = device::Load<kWidth>(gate + n + at);
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = first + i * kThreads * kWidth;
      if (at >= n) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) g[i].v[j] = device::SiluTimes(g[i].v[j], u[i].v[j]);
      if (p.out_bf16 != nullptr) device::Store<kWidth>(g[i], p.out_bf16 + row * n + at);
      if (p.out_f32 != nullptr) device::Store<kWidth>(g[i], p.out_f32 + row * n + at);
    }
  }
}

template <typename In>
absl::Status Launch(const In* x, const SwiGluCudaParams& p, StreamHandle stream) {
  const bool wide = p.intermediate % kWidest == 0 && p.ldx % kWidest == 0 && Aligned(x, 16) &&
                    Aligned(p.out_bf16, 16) && Aligned(p.out_f32, 16);
  const int per_block = kThreads * kPerThread * (wide ? kWidest : 1);
  const dim3 grid(static_cast<unsigned>((p.intermediate + per_block - 1) / per_block),
                  static_cast<unsigned>(std::min(p.m, 65535)));
  return LaunchEarly(wide ? SwiGluKernel<In, kWidest> : SwiGluKernel<In, 1>, grid, kThreads, 0,
                     stream, x, p);
}

}  // namespace

absl::Status ValidateSwiGluCuda(const SwiGluCudaParams& p) {
  if ((p.x_f32 == nullptr) == (p.x_bf16 == nullptr)) {
    return absl::InvalidArgumentError("swiglu: exactly one of x_f32 and x_bf16 must be set");
  }
  if (p.out_bf16 == nullptr && p.out_f32 == nullptr) {
    return absl::InvalidArgumentError("swiglu: no output is set");
  }
  constexpr int kMost = 1 << 30;  // columns are stepped through in 32 bits
  if (p.m < 0 || p.intermediate < 1 || p.intermediate > kMost ||
      p.ldx < 2 * int64_t{p.intermediate}) {
    return absl::InvalidArgumentError(absl::StrCat(
        "swiglu: bad shape m=", p.m, " intermediate=", p.intermediate, " ldx=", p.ldx));
  }
  return absl::OkStatus();
}

absl::Status LaunchSwiGlu(const SwiGluCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateSwiGluCuda(p));
  if (p.m == 0) return absl::OkStatus();
  return p.x_f32 != nullptr ? Launch(p.x_f32, p, stream) : Launch(p.x_bf16, p, stream);
}

}  // namespace winnow::kernels
