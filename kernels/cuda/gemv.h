#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"

// Products of few rows (a decode step) by a large weight matrix: the weights are streamed once,
// which is all the time it takes.
//
//   y[i, j] = w_scale[j] * sum_k x[i, k] * w[j, k]          (w_scale: e4m3 weights only)
//   kStore:   out[i, j] = y[i, j]
//   kAdd:     out[i, j] = out[i, j] + y[i, j]               (residual; one addition)
//   kSiluMul: out[i, j] = silu(y[i, j]) * y[i, n / 2 + j], j < n / 2, silu(g) = g / (1 + exp(-g))
//
// Products of BF16 are exact and summed in float. Beside e4m3 on sm_90a, x is the sum of two e4m3
// numbers, off by up to 2^-17 of the largest of its 128 or 2^-136, and products are summed in FP8
// tensor cores, which drop what is under 2^-13 of the largest of 32 and of their sum; every 128 are
// added up in float. In the middle y is off by 2^-12 of its size for random numbers, half of what
// rounding it to BF16 costs. A row whose x is not finite is NaN. (Elsewhere: as BF16.)
// The order depends on k alone, so a row of `out` has the same bits whatever m and the other rows.
namespace winnow::kernels {

inline constexpr int kMaxGemvRows = 16;
inline constexpr int kMaxGemvK = 32768;

enum class GemvWeights : uint8_t { kBf16, kE4m3 };
enum class GemvEpilogue : uint8_t { kStore, kAdd, kSiluMul };

// All pointers are device pointers.
struct GemvParams {
  const Bf16* x = nullptr;         // [m, k], row stride ldx; 16-byte aligned
  const void* w = nullptr;         // [n, k] contiguous, of `weights`' type; 16-byte aligned
  const float* w_scale = nullptr;  // [n]: a row's scale; with kE4m3 only. Codes 0x7f, 0xff: never
  // Exactly one is set: [m, n] (kSiluMul: [m, n / 2]), row stride ldo. kAdd: the float one. Must
  // not overlap an input.
  float* out_f32 = nullptr;
  Bf16* out_bf16 = nullptr;  // rounded once, at the end
  int m = 0;                 // in [0, 16]; 0 does nothing
  int n = 0;                 // >= 1; even for kSiluMul
  int k = 0;                 // in [1, 32768], a multiple of 8 (BF16 weights) or 16 (e4m3)
  int64_t ldx = 0, ldo = 0;  // elements; ldx a multiple of 8
  GemvWeights weights = GemvWeights::kBf16;
  GemvEpilogue epilogue = GemvEpilogue::kStore;
  bool portable = false;  // the kernel for any device, to test it; other bits
};

// INVALID_ARGUMENT for a null or misaligned pointer or a bad shape, UNIMPLEMENTED for k past
// kMaxGemvK. Reads no device memory.
absl::Status ValidateGemv(const GemvParams& params);

// Enqueues on `stream`; never synchronizes or allocates. The kernel may start before the kernels
// ahead of it in the stream have ended and reads `w` and `w_scale` at once (all else it reads and
// writes after they have): nothing enqueued that may still run can be writing them.
absl::Status LaunchGemv(const GemvParams& params, StreamHandle stream);

}  // namespace winnow::kernels
