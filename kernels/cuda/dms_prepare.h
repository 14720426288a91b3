#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/dms_prefill.h"
#include "kernels/dms_compact.h"

namespace winnow::kernels {

// What DmsCompactCpu does, from the rows of the QKV product of a ragged batch of chunks, in
// one pass: q/k norm, decision, zeroing, RoPE, rotation, K and V to stored form. Decisions
// and stored bytes are the CPU's (but for the payload of a NaN in a BF16 cache), queries the CPU's
// rounded to BF16. The band's chunk rows get the stored values rounded to BF16, so
// LaunchDmsPrefillCompact() with k and v null follows. Rows of no sequence are neither read nor
// written. Pointers are to device memory.
struct DmsPrepareParams {
  DmsPrefillBatch batch;  // what it says of sequences and the band
  KvFormatId format = KvFormatId::kFp8;
  const Bf16* q = nullptr;  // [num_rows, num_kv_heads * group, head_dim], row stride q_stride
  const Bf16* k = nullptr;  // [num_rows, num_kv_heads, head_dim], row stride kv_stride
  const Bf16* v = nullptr;  // as k
  int64_t q_stride = 0, kv_stride = 0;  // elements, multiples of 8
  const float* q_norm = nullptr;        // [head_dim]; null: no norm
  const float* k_norm = nullptr;        // [head_dim]; null: no norm
  float norm_eps = 1e-6f;
  const float* logit_inputs = nullptr;  // [num_rows, num_kv_heads], kLogits only
  int64_t logit_stride = 0;             // elements
  const int32_t* positions = nullptr;   // [num_rows]; absolute, rows of the tables
  const float* rope_cos = nullptr;      // [num_positions, head_dim / 2]
  const float* rope_sin = nullptr;      // as rope_cos
  DecisionRule rule;
  Bf16* q_out = nullptr;         // as q, row stride q_out_stride; may be q if that fits
  int64_t q_out_stride = 0;      // elements, a multiple of 8
  uint8_t* decisions = nullptr;  // [num_rows, num_kv_heads], 1: evict; null: not wanted
  uint8_t* rows = nullptr;  // [num_rows, num_kv_heads, TokenBytes], 4-byte aligned; may be null
};

// INVALID_ARGUMENT naming the field; UNIMPLEMENTED for a head_dim that is not 64 or 128 or
// a group of more than 16. What lies in device memory is not looked at: REQUIRES that
// positions are rows of the tables.
absl::Status ValidateDmsPrepare(const DmsPrepareParams& params);
// UNIMPLEMENTED if `limit` bytes of shared memory a block do not hold the queries of a group and
// the rows of the format: sm_80's hold all, sm_89's 11 heads of 128. REQUIRES valid params.
absl::Status CheckDmsPrepareSharedBytes(const DmsPrepareParams& params, int64_t limit);
// As both say, with the limit of the current device.
absl::Status LaunchDmsPrepare(const DmsPrepareParams& params, StreamHandle stream);

}  // namespace winnow::kernels
