#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/dms_prefill.h"

// The sparse prefill with both products on FP8 tensor cores (sm_90a; head_dim 128; the
// cache's format fp8). K and V are read as the cache stores them, e4m3 codes and a scale
// a token; queries and weights are rounded to e4m3 on top of that, so its output is
// coarser than dms_prefill.h's. Ops and lifetimes are otherwise those of dms_prefill.h.
namespace winnow::kernels {

inline constexpr int kPrefillFp8Dim = 128;
// Of V as it is laid out: its own, then eight whose outputs make the sum of weights.
inline constexpr int kPrefillFp8Channels = kPrefillFp8Dim + 8;

// Keys and values in device memory. Rows are counted within a KV head; how a row lies among
// the 16 of its block, the functions below say.
struct DmsPrefillFp8Rows {
  uint8_t* k = nullptr;        // [num_kv_heads, rows, 128], codes
  uint8_t* v = nullptr;        // [num_kv_heads, rows, 136], codes, with PrefillFp8Octaves() less
  uint16_t* scales = nullptr;  // [num_kv_heads, rows, 2], as float16: what scores need
};

// Of the code of (row, dim), from the head's first: 8 rows are eight columns of 16 bytes.
constexpr int64_t PrefillFp8KeyByte(int64_t row, int dim) {
  return row / 8 * 1024 + dim / 16 * 128 + row % 8 * 16 + dim % 16;
}
// V transposed, 16 keys a channel, in the order in which a thread's two columns of each
// 8 scores become 4 bytes of weights.
constexpr int64_t PrefillFp8ValueByte(int64_t row, int channel) {
  const int64_t key = row % 16;
  return row / 16 * (16 * kPrefillFp8Channels) + channel * 16 + key % 8 / 2 * 4 + key / 8 * 2 +
         key % 2;
}
// Of a row's first number in `scales`; its second is two further on. A thread reads those
// of its four columns of 16 at once.
constexpr int64_t PrefillFp8ScaleAt(int64_t row) {
  return row / 16 * 32 + row % 8 / 2 * 8 + row % 16 / 8 * 4 + row % 2;
}

// `rows` takes the place of its band_k, band_v, compact_k and compact_v, which are not
// read: band_rows and compact_rows are multiples of 16, and so are band_row and
// compact_row of each sequence. What is left of the last 16 rows of a band and of its
// survivors is the op's.
struct DmsPrefillFp8Batch {
  DmsPrefillBatch rows;
  DmsPrefillFp8Rows band, compact;
};

size_t DmsPrefillFp8ScratchBytes(const DmsPrefillBatch& batch);
// INVALID_ARGUMENT naming the field; UNIMPLEMENTED for another head_dim than 128.
absl::Status ValidateDmsPrefillFp8Batch(const DmsPrefillFp8Batch& batch);

// As DmsPrefillCompactParams of format fp8. Prefix tokens come as the cache's flat rows.
struct DmsPrefillFp8CompactParams {
  DmsPrefillFp8Batch batch;
  // [num_rows, num_kv_heads, 128], row stride kv_stride, 16-byte aligned
  const Bf16* k = nullptr;
  const Bf16* v = nullptr;                // as k
  int64_t kv_stride = 0;                  // elements, a multiple of 8
  const uint8_t* decisions = nullptr;     // [num_rows, num_kv_heads], 1: evict; null: all keep
  const uint8_t* prefix_evict = nullptr;  // [band_rows, num_kv_heads], read for prefix tokens only
  const uint8_t* prefix_rows = nullptr;  // [band_rows, num_kv_heads, 260], likewise; 4-byte aligned
  uint8_t* rows = nullptr;  // [num_rows, num_kv_heads, 260], 4-byte aligned; null: unwanted
};
absl::Status ValidateDmsPrefillFp8Compact(const DmsPrefillFp8CompactParams& params);
absl::Status LaunchDmsPrefillFp8Compact(const DmsPrefillFp8CompactParams& params,
                                        StreamHandle stream);

// As DmsPrefillCudaParams. Queries are rounded to e4m3 with a power of two of the row's.
// Weights, times V's scale, are e4m3 of 2^i (1 + f) for the power 2^(i + f): up to 6 % more,
// the same for a whole number i more or less; less than 2^-13 of a row's largest may count as
// nothing. What a row's weights are divided by is the sum of the rounded ones. Scores
// are summed in float16, outputs of up to 2048 keys in the tensor cores, which keep 13 bits,
// else in float32. A key times a query whose largest entry were 1 must stay below 65504
// (so must 128 * 448, which is why keys of up to 448 always do), or the row is NaN.
// UNIMPLEMENTED without sm_90a code.
struct DmsPrefillFp8CudaParams {
  DmsPrefillFp8Batch batch;
  const Bf16* q = nullptr;  // [num_rows, num_kv_heads * group, 128], row stride q_stride
  int64_t q_stride = 0;     // elements, a multiple of 8
  Bf16* out = nullptr;      // [num_rows, num_kv_heads * group, 128]
  float scale = 0.0f;
};
absl::Status ValidateDmsPrefillFp8Attention(const DmsPrefillFp8CudaParams& params);
absl::Status LaunchDmsPrefillFp8Attention(const DmsPrefillFp8CudaParams& params,
                                          StreamHandle stream);

}  // namespace winnow::kernels
