#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device_spans.h"
#include "kernels/cuda/dms_prefill.h"

// A chunk of prefill between cache and attention, one layer a call:
//
//   LaunchPrefixLoad         cached tokens to where the prefill's ops read them
//   LaunchDmsPrepare, LaunchDmsPrefillCompact, LaunchDmsPrefillAttention
//   LaunchCacheAppend        the chunk's tokens to the cache
//
// All lengths are read on the device. Pointers are to device memory.
namespace winnow::kernels {

// The cached tokens of each sequence, as they are stored, rounded to BF16: survivors in
// order to compact_k and compact_v, ring and newest in order to the band's prefix rows.
// REQUIRES: a sequence's num_prefix is min(spans.window + 1, its cached tokens).
struct PrefixLoadParams {
  DmsPrefillBatch batch;
  DeviceSpans spans;
  const int32_t* slots = nullptr;    // [batch]; < 0: no sequence, nothing cached
  int layer = 0;                     // of spans
  int32_t* num_survivors = nullptr;  // [batch, num_kv_heads]: what batch.num_survivors reads
  uint8_t* prefix_evict = nullptr;   // [band_rows, num_kv_heads]: written for prefix tokens
};

// INVALID_ARGUMENT naming what is null or does not fit.
absl::Status ValidatePrefixLoad(const PrefixLoadParams& params);
absl::Status LaunchPrefixLoad(const PrefixLoadParams& params, StreamHandle stream);

// All tokens of the chunks enter their spans: afterwards those are as AdvanceSpan() leaves
// them. Reads what LaunchDmsPrefillCompact() of the same batch left in its scratch. Pages
// are taken from the pool; a span that does not get all it needs does not advance, and
// pool.exhausted is set: the call cannot be repeated, since the others have advanced; such a
// sequence is released whole.
// REQUIRES: as above of num_prefix; batch.num_survivors is that of the spans. With
// spans.window 0 all tokens of the batch are kept.
struct CacheAppendParams {
  DmsPrefillBatch batch;
  DeviceSpans spans;
  DevicePagePool pool;
  const int32_t* slots = nullptr;  // [batch]: all distinct; < 0: no sequence
  int layer = 0;                   // of spans
  const uint8_t* rows = nullptr;   // [num_rows, num_kv_heads, TokenBytes], 4-byte aligned
};

// INVALID_ARGUMENT naming what is null or does not fit.
absl::Status ValidateCacheAppend(const CacheAppendParams& params);
absl::Status LaunchCacheAppend(const CacheAppendParams& params, StreamHandle stream);

}  // namespace winnow::kernels
