#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/thread_pool.h"
#include "kernels/kv_format.h"

namespace winnow::kernels {

enum class DecisionSource : uint8_t {
  kNone,                 // no decisions: all keep
  kBorrowedAfterQNorm,   // first query head of a group, last channel, after q-norm
  kBorrowedBeforeQNorm,  // the same channel as the projection gives it
  kLogits,               // a separate projection (dms_proj_alpha)
};

enum class ChannelZeroing : uint8_t { kNone, kBeforeRope, kBeforeAndAfterRope };

// How a token's eviction bit comes about: evict iff u * scale - offset > 0 in
// float32, strictly. u is a borrowed query channel rounded to BF16 (unless
// `round_to_bf16` is false), or the separate projection's output unrounded.
struct DecisionRule {
  DecisionSource source = DecisionSource::kNone;
  ChannelZeroing zeroing = ChannelZeroing::kNone;  // of the borrowed channel; also when all is kept
  float scale = 100.0f;
  float offset = 5.0f;
  bool per_layer = false;  // KV head 0's bit for every head
  bool round_to_bf16 = true;

  bool Evicts(float u) const { return u * scale - offset > 0.0f; }
};

// What follows the QKV GEMM, one token a row: q/k norm (RMS over a head, float32), decision,
// zeroing, RoPE at the token's absolute position, the format's rotation of q, k and v,
// K and V to stored form.
// The borrowed channel takes part in the RMS with its raw value and is zeroed
// afterwards. Each row depends on itself and its position alone.
struct DmsCompactParams {
  const float* q = nullptr;  // [num_tokens, num_heads, head_dim], row stride q_stride
  const float* k = nullptr;  // [num_tokens, num_kv_heads, head_dim], row stride k_stride
  const float* v = nullptr;  // as k, row stride v_stride
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;  // elements
  const float* q_norm = nullptr;                     // [head_dim]; null: no norm
  const float* k_norm = nullptr;                     // [head_dim]; null: no norm
  float norm_eps = 1e-6f;
  const float* logit_inputs =
      nullptr;               // [num_tokens, num_kv_heads], kLogits only: dms_proj_alpha's output
  int64_t logit_stride = 0;  // elements
  const int32_t* positions = nullptr;  // [num_tokens]; absolute, in [0, num_positions)
  const float* rope_cos = nullptr;     // [num_positions, head_dim / 2]
  const float* rope_sin = nullptr;     // as rope_cos
  int num_positions = 0;
  DecisionRule rule;
  KvFormatId format = KvFormatId::kFp8;
  float* q_out = nullptr;        // [num_tokens, num_heads, head_dim]; may be q if q_stride fits
  uint8_t* rows = nullptr;       // [num_tokens, num_kv_heads, TokenBytes]: flat rows
  uint8_t* decisions = nullptr;  // [num_tokens, num_kv_heads]: 1 evict; null: not wanted
  int num_tokens = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
};

// INVALID_ARGUMENT for a null pointer, bad shape or position; UNIMPLEMENTED for
// a head_dim that ValidateHeadDim() refuses.
absl::Status ValidateDmsCompact(const DmsCompactParams& params);
// `pool` may be null: the calling thread alone.
absl::Status DmsCompactCpu(const DmsCompactParams& params, ThreadPool* pool);

}  // namespace winnow::kernels
