#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/vector_io.cuh"

namespace winnow::kernels {
namespace {

constexpr int kThreads = 256, kPerThread = 2;

// Grid (pieces of a row, tokens), block kThreads; tokens beyond gridDim.y in turns.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) EmbeddingKernel(const EmbeddingCudaParams p) {
  ptx::WaitForPredecessors();
  const int first =
      (static_cast<int>(blockIdx.x) * kThreads * kPerThread + static_cast<int>(threadIdx.x)) *
      kWidth;
  for (int t = static_cast<int>(blockIdx.y); t < p.num_tokens; t += static_cast<int>(gridDim.y)) {
    const int token = p.tokens[t];
    const bool known = token >= 0 && token < p.vocab;
    const Bf16* in = p.table + static_cast<int64_t>(known ? token : 0) * p.hidden;
    float* out = p.out + static_cast<int64_t>(t) * p.hidden;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = first + i * kThreads * kWidth;
      if (at >= p.hidden) continue;
      device::Floats<kWidth> x = device::Load<kWidth>(in + at);
      for (float& v : x.v) v = known ? v : __int_as_float(0x7fffffff);
      device::Store<kWidth>(x, out + at);
    }
  }
}

}  // namespace

absl::Status ValidateEmbeddingCuda(const EmbeddingCudaParams& p) {
  if (p.table == nullptr || p.tokens == nullptr || p.out == nullptr) {
    return absl::InvalidArgumentError("embedding: table, tokens or out is null");
  }
  constexpr int kMost = 1 << 30;  // both are stepped through in 32 bits
  if (p.num_tokens < 0 || p.num_tokens > kMost || p.vocab < 1 || p.hidden < 1 || p.hidden > kMost) {
    return absl::InvalidArgumentError(absl::StrCat("embedding: bad shape num_tokens=", p.num_tokens,
                                                   " vocab=", p.vocab, " hidden=", p.hidden));
  }
  return absl::OkStatus();
}

absl::Status LaunchEmbedding(const EmbeddingCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateEmbeddingCuda(p));
  if (p.num_tokens == 0) return absl::OkStatus();
  const bool wide = p.hidden % 4 == 0 && Aligned(p.table, 8) && Aligned(p.out, 16);
  const int per_block = kThreads * kPerThread * (wide ? 4 : 1);
  const dim3 grid(static_cast<unsigned>((p.hidden + per_block - 1) / per_block),
                  static_cast<unsigned>(std::min(p.num_tokens, 65535)));
  return LaunchEarly(wide ? EmbeddingKernel<4> : EmbeddingKernel<1>, grid, kThreads, 0, stream, p);
}

}  // namespace winnow::kernels
