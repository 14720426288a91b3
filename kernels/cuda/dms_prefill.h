#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"
#include "kernels/kv_format.h"

// The sparse prefill on a GPU: one layer of a ragged batch of chunks.
//
//   LaunchDmsPrefillCompact    stores K and V as the cache will, rounds them back to
//                              BF16 and lays the survivors of each KV head side by side
//   LaunchDmsPrefillAttention  attention over those
//
// Both enqueue on the caller's stream and neither synchronize nor allocate; how
// many tokens survive is known on the device alone.
namespace winnow::kernels {

// A sequence's part of the batch. Its band is the `num_prefix` tokens just before the
// chunk, then the chunk. num_prefix is at least min(window, tokens before the chunk).
struct DmsPrefillSequence {
  int32_t row = 0;         // of its first chunk token in q, k, v, decisions, rows and out
  int32_t num_tokens = 0;  // of the chunk
  int32_t band_row = 0;    // of its first band token in band_k and band_v
  int32_t num_prefix = 0;
  int32_t compact_row = 0;  // of its first survivor in compact_k and compact_v
};

// The batch: pointers are to device memory.
// Behind a band that is not the last of the tensor the next 8 rows are the op's (it
// writes zeros), as are the 8 behind a sequence's survivors; so compact_row + the
// survivors older than the band + num_prefix + num_tokens + 8 is the earliest place of
// the next sequence's. Survivors older than the band are there before the call.
struct DmsPrefillBatch {
  const DmsPrefillSequence* sequences = nullptr;  // [batch]
  const int32_t* num_survivors = nullptr;  // [batch, num_kv_heads], older than the band; null: 0
  Bf16* band_k = nullptr;                  // [band_rows, num_kv_heads, head_dim]
  Bf16* band_v = nullptr;                  // as band_k
  Bf16* compact_k = nullptr;               // [num_kv_heads, compact_rows, head_dim]
  Bf16* compact_v = nullptr;               // as compact_k
  void* scratch = nullptr;                 // DmsPrefillScratchBytes(); from one op to the other
  int batch = 0, num_kv_heads = 0, group = 0, head_dim = 0;  // group: query heads a KV head
  int window = 0, shift = 1;                                 // window >= 1; shift 0 or 1
  int num_rows = 0;                                          // rows of q, k, v, ...
  int band_rows = 0, compact_rows = 0;
  int max_band = 0;  // no sequence's num_prefix + num_tokens is more
};

// What scratch the two ops share. A multiple of 256.
size_t DmsPrefillScratchBytes(const DmsPrefillBatch& batch);
// INVALID_ARGUMENT naming the field; UNIMPLEMENTED for a head_dim that is not 64 or
// 128. What lies in device memory is not looked at.
absl::Status ValidateDmsPrefillBatch(const DmsPrefillBatch& batch);

// k and v are after norm, RoPE and, for a rotated format, its rotation. Row (t, h) of
// `rows` is StoreRow()'s, bit by bit; band_k and band_v get its values rounded to BF16
// (a sequence of batch 1 may name k and v themselves). A token's eviction is the
// decision of the next token with shift 1 (the last one's is unknown: kept), its own
// with shift 0. A survivor is a band token that is kept; only those older than the
// window of some query of the chunk are laid out. If k, v and rows are all null, the band's
// chunk rows hold stored values already (LaunchDmsPrepare() writes them).
struct DmsPrefillCompactParams {
  DmsPrefillBatch batch;
  KvFormatId format = KvFormatId::kFp8;
  // [num_rows, num_kv_heads, head_dim], row stride kv_stride, 16-byte aligned
  const Bf16* k = nullptr;
  const Bf16* v = nullptr;                // as k
  int64_t kv_stride = 0;                  // elements, a multiple of 8
  const uint8_t* decisions = nullptr;     // [num_rows, num_kv_heads], 1: evict; null: all keep
  const uint8_t* prefix_evict = nullptr;  // [band_rows, num_kv_heads], read for prefix tokens only
  uint8_t* rows = nullptr;  // [num_rows, num_kv_heads, TokenBytes], 4-byte aligned; null: unwanted
};
absl::Status ValidateDmsPrefillCompact(const DmsPrefillCompactParams& params);
absl::Status LaunchDmsPrefillCompact(const DmsPrefillCompactParams& params, StreamHandle stream);

// out[i,h,:] = sum_j softmax_j(scale * <q[i,h,:], k[j,g,:]>) * v[j,g,:] over the
// survivors older than the band and, of the band, j <= i with i - j <= window or j kept.
// Products of BF16, sums in float32; the weights are rounded to BF16 before they meet v
// on the tensor cores. Values of 2^63 and more (format bf16 alone has them) may overflow on sm_90a
// where their weighted mean would not; there a value that is not finite makes NaN of all rows of
// a tile that has its key, those that do not see it too. A row's bits depend on its sequence
// alone, not on its place in the batch. Follows LaunchDmsPrefillCompact() of the same batch on
// the same stream.
struct DmsPrefillCudaParams {
  DmsPrefillBatch batch;
  // [num_rows, num_kv_heads * group, head_dim], row stride q_stride; 16-byte aligned, as out.
  const Bf16* q = nullptr;
  int64_t q_stride = 0;  // elements, a multiple of 8
  Bf16* out = nullptr;   // [num_rows, num_kv_heads * group, head_dim]
  float scale = 0.0f;
  bool portable = false;  // the kernel for GPUs without wgmma, whatever the GPU
};
absl::Status ValidateDmsPrefillAttentionCuda(const DmsPrefillCudaParams& params);
absl::Status LaunchDmsPrefillAttention(const DmsPrefillCudaParams& params, StreamHandle stream);

}  // namespace winnow::kernels
