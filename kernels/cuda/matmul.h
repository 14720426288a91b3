#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/cublaslt_matmul.h"
#include "kernels/cuda/gemv.h"

// A linear layer's product by what suits its number of rows (gemm_gpu_bench times both):
//   out[i, j] (+)= w_scale[j] * sum_k x[i, k] * w[j, k]
// Up to kMaxGemvRows rows of k up to kMaxGemvK LaunchGemv (gemv.h says what a sum is off by): a row
// has the same bits whatever the batch. Past either cuBLASLt: by e4m3 weights, rows of x are first
// quantized to e4m3 with a scale each (matmul_quantize.h says what is lost), and bits depend on m.
namespace winnow::kernels {

// All pointers are device pointers.
struct LinearParams {
  const Bf16* x = nullptr;         // [m, k], row stride ldx; 16-byte aligned
  const void* w = nullptr;         // [n, k] contiguous, of `weights`' type; 16-byte aligned
  const float* w_scale = nullptr;  // [n], with kE4m3 only
  // Exactly one is set: [m, n], row stride ldo; for cuBLASLt as MatmulParams wants it.
  float* out_f32 = nullptr;
  Bf16* out_bf16 = nullptr;
  void* workspace = nullptr;  // LinearWorkspaceBytes(), 256-byte aligned; as MatmulParams'
  size_t workspace_bytes = 0;
  int m = 0, n = 0, k = 0;
  int64_t ldx = 0, ldo = 0;
  GemvWeights weights = GemvWeights::kBf16;
  bool accumulate = false;  // out_f32 alone
};

// For up to `m` rows; none where LaunchGemv() does it.
size_t LinearWorkspaceBytes(int m, int k, GemvWeights weights);

// INVALID_ARGUMENT or UNIMPLEMENTED as LaunchGemv(), LaunchQuantizeRows() and CublasLt::Launch()
// say, and INVALID_ARGUMENT for too little workspace. Enqueues; `lt` is used on this thread.
absl::Status LaunchLinear(const LinearParams& params, CublasLt* lt, StreamHandle stream);

}  // namespace winnow::kernels
