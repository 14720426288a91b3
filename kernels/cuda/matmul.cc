#include "kernels/cuda/matmul.h"

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/cuda/matmul_quantize.h"

namespace winnow::kernels {
namespace {

size_t RoundUp(size_t bytes) { return (bytes + 255) / 256 * 256; }

// A row's scale and codes lie behind cuBLASLt's own part.
size_t ScaleBytes(int m) { return RoundUp(static_cast<size_t>(m) * sizeof(float)); }
size_t CodeBytes(int m, int k) { return RoundUp(static_cast<size_t>(m) * static_cast<size_t>(k)); }

bool IsFew(int m, int k) { return m <= kMaxGemvRows && k <= kMaxGemvK; }

absl::Status LaunchFew(const LinearParams& p, StreamHandle stream) {
  return LaunchGemv({.x = p.x,
                     .w = p.w,
                     .w_scale = p.w_scale,
                     .out_f32 = p.out_f32,
                     .out_bf16 = p.out_bf16,
                     .m = p.m,
                     .n = p.n,
                     .k = p.k,
                     .ldx = p.ldx,
                     .ldo = p.ldo,
                     .weights = p.weights,
                     .epilogue = p.accumulate ? GemvEpilogue::kAdd : GemvEpilogue::kStore},
                    stream);
}

}  // namespace

size_t LinearWorkspaceBytes(int m, int k, GemvWeights weights) {
  if (IsFew(m, k)) return 0;
  return kMatmulWorkspaceBytes +
         (weights == GemvWeights::kE4m3 ? ScaleBytes(m) + CodeBytes(m, k) : 0);
}

absl::Status LaunchLinear(const LinearParams& p, CublasLt* lt, StreamHandle stream) {
  if (p.accumulate && p.out_f32 == nullptr) {
    return absl::InvalidArgumentError("linear: accumulate adds to out_f32");
  }
  if (IsFew(p.m, p.k)) return LaunchFew(p, stream);
  if (p.k < 1) return absl::InvalidArgumentError(absl::StrCat("linear: k=", p.k));
  const size_t needed = LinearWorkspaceBytes(p.m, p.k, p.weights);
  if (p.workspace == nullptr || p.workspace_bytes < needed) {
    return absl::InvalidArgumentError(absl::StrCat("linear: workspace_bytes=", p.workspace_bytes,
                                                   ", m=", p.m, " needs ", needed));
  }
  MatmulParams matmul{.x = p.x,
                      .w = p.w,
                      .out_f32 = p.out_f32,
                      .out_bf16 = p.out_bf16,
                      .workspace = p.workspace,
                      .workspace_bytes = kMatmulWorkspaceBytes,
                      .m = p.m,
                      .n = p.n,
                      .k = p.k,
                      .ldx = p.ldx,
                      .ldo = p.ldo,
                      .accumulate = p.accumulate};
  if (p.weights == GemvWeights::kBf16) {
    if (p.w_scale != nullptr) {
      return absl::InvalidArgumentError("linear: w_scale belongs to e4m3 weights");
    }
    return lt->Launch(matmul, stream);
  }
  auto* scale =
      reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + kMatmulWorkspaceBytes);
  uint8_t* codes = reinterpret_cast<uint8_t*>(scale) + ScaleBytes(p.m);
  matmul.x = codes;
  matmul.ldx = p.k;
  matmul.x_scale = scale;
  matmul.w_scale = p.w_scale;
  matmul.type = MatmulType::kE4m3;
  matmul.scales = MatmulScales::kPerRow;
  WINNOW_RETURN_IF_ERROR(ValidateMatmul(matmul));
  WINNOW_RETURN_IF_ERROR(LaunchQuantizeRows(
      {.x = p.x, .codes = codes, .scale = scale, .m = p.m, .k = p.k, .ldx = p.ldx}, stream));
  return lt->Launch(matmul, stream);
}

}  // namespace winnow::kernels
