#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"

// The five primitives of the padded prefill path. Elements are moved as bytes,
// so any element type serves; outputs must not alias inputs and are written whole.
namespace winnow::kernels {

// out[n, seq - len + j, :] = in[n, j, :] for j < len = lens[n]; zero in front.
struct LeftPad2dParams {
  const void* in = nullptr;       // [num_rows, seq, row_bytes]
  const int32_t* lens = nullptr;  // [num_rows]; in [0, seq]
  void* out = nullptr;            // as in
  int num_rows = 0, seq = 0;
  size_t row_bytes = 0;  // bytes of one position (head_dim * element size)
};
// INVALID_ARGUMENT for a null pointer or bad shape. Reads no device memory.
absl::Status ValidateLeftPad2d(const LeftPad2dParams& params);
// Device pointers; a length outside [0, seq] is clamped. UNIMPLEMENTED without CUDA.
absl::Status LaunchLeftPad2d(const LeftPad2dParams& params, StreamHandle stream);
// INVALID_ARGUMENT also for a length outside [0, seq].
absl::Status LeftPad2dCpu(const LeftPad2dParams& params);

// out[b, idx[b, j], :] = in[b, in_seq - len + j, :] for j < len = lens[b]; zero elsewhere.
struct ScatterByIndexParams {
  const void* in = nullptr;       // [batch, in_seq, row_bytes]
  const int32_t* idx = nullptr;   // [batch, max_len]; distinct within a row, in [0, out_seq)
  const int32_t* lens = nullptr;  // [batch]; in [0, min(max_len, in_seq)]
  void* out = nullptr;            // [batch, out_seq, row_bytes]
  int batch = 0, in_seq = 0, out_seq = 0, max_len = 0;
  size_t row_bytes = 0;
};
absl::Status ValidateScatterByIndex(const ScatterByIndexParams& params);
// As LaunchLeftPad2d; an index outside [0, out_seq) is skipped.
absl::Status LaunchScatterByIndex(const ScatterByIndexParams& params, StreamHandle stream);
absl::Status ScatterByIndexCpu(const ScatterByIndexParams& params);

// The positions where mask is set, in order, right-aligned; zero in front:
// out[b, h, seq - count + j, :] = in[b, h, idx[b, j], :]. Inverse: ScatterByIndex.
struct BoolGatherLeftPadParams {
  const void* in = nullptr;       // [batch, num_heads, seq, row_bytes]
  const uint8_t* mask = nullptr;  // [batch, seq]; 0 or not
  void* out = nullptr;            // as in
  int32_t* idx = nullptr;         // [batch, seq]; entries past counts[b] are -1
  int32_t* counts = nullptr;      // [batch]
  int batch = 0, num_heads = 0, seq = 0;
  size_t row_bytes = 0;
};
absl::Status ValidateBoolGatherLeftPad(const BoolGatherLeftPadParams& params);
absl::Status LaunchBoolGatherLeftPad(const BoolGatherLeftPadParams& params, StreamHandle stream);
absl::Status BoolGatherLeftPadCpu(const BoolGatherLeftPadParams& params);

// The masked elements to the front, in order; positions past the count keep `in`'s values.
struct CompactByBoolParams {
  const void* in = nullptr;       // [num_rows, seq, row_bytes]
  const uint8_t* mask = nullptr;  // [num_rows, seq]; 0 or not
  void* out = nullptr;            // as in
  int32_t* counts = nullptr;      // [num_rows]
  int num_rows = 0, seq = 0;
  size_t row_bytes = 0;
};
absl::Status ValidateCompactByBool(const CompactByBoolParams& params);
absl::Status LaunchCompactByBool(const CompactByBoolParams& params, StreamHandle stream);
absl::Status CompactByBoolCpu(const CompactByBoolParams& params);

// A key's part in the fused prefill. Padding is a state of its own: never visible.
enum class KeyState : int8_t { kKeep = 0, kEvict = 1, kPadding = 2 };

// States of [old | new] keys from decisions in which the bit of a token decides
// its predecessor: new token k + 1 decides new token k, new token 0 the last old
// one; the last new token's bit is not known yet, it is kept. Old and new keys are
// left padded.
struct KeyStateParams {
  const uint8_t* new_decisions = nullptr;      // [num_rows, new_seq]; 1: evict
  const uint8_t* old_evicted = nullptr;        // [num_rows, old_seq]; may be null if old_seq is 0
  const int32_t* old_lens = nullptr;           // [num_rows]; in [0, old_seq]; null if old_seq is 0
  const int32_t* new_lens = nullptr;           // [num_rows]; in [0, new_seq]
  KeyState* state = nullptr;                   // [num_rows, old_seq + new_seq]
  int num_rows = 0, old_seq = 0, new_seq = 0;  // num_rows: batch * num_kv_heads
};
absl::Status KeyStateCpu(const KeyStateParams& params);

// Prefill attention of left-padded rows over [old | new] keys in float32:
//   visible(m, n) = n <= q and state[n] != kPadding and (q - n <= window or state[n] == kKeep),  q
//   = old_seq + m
// A query row without a visible key gives 0.
struct DmsFusedPrefillParams {
  const float* q = nullptr;         // [batch, num_heads, new_seq, head_dim]
  const float* k = nullptr;         // [batch, num_kv_heads, old_seq + new_seq, head_dim]
  const float* v = nullptr;         // as k
  const KeyState* state = nullptr;  // [batch, num_kv_heads, old_seq + new_seq]
  float* out = nullptr;  // [batch * num_kv_heads, new_seq, num_heads / num_kv_heads, head_dim]
  int batch = 0, num_heads = 0, num_kv_heads = 0, old_seq = 0, new_seq = 0, head_dim = 0;
  int window = 0;
  float scale = 0.0f;
};
absl::Status DmsFusedPrefillCpu(const DmsFusedPrefillParams& params);

}  // namespace winnow::kernels
