#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/kv_format.h"

// The spans of kv_span.h in device memory: the same tokens, pages and states, in flat
// arrays, so that kernels and CUDA graphs read every length on the device.
//
// Span (layer, slot, g) has index (layer * max_sequences + slot) * num_kv_heads + g;
// a slot is one sequence of the cache.
namespace winnow::kernels {

// The counters of kv_span.h's Span.
struct SpanState {
  int32_t num_survivors = 0;
  int32_t num_ring = 0;
  int32_t ring_start = 0;
  int32_t num_tokens = 0;
};

struct DeviceSpans {
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 0;
  int window = 0;  // as in KvLayout
  int shift = 1;
  int num_layers = 0, max_sequences = 0, num_kv_heads = 0;
  int max_survivor_pages = 0;  // entries a span of survivor_pages; a multiple of 4

  uint8_t* pages = nullptr;           // page p starts at pages + p * PageBytes(); 16-byte aligned
  SpanState* state = nullptr;         // [num_spans]
  int32_t* survivor_pages = nullptr;  // [num_spans, max_survivor_pages]; 16-byte aligned
  int32_t* ring_pages = nullptr;      // [num_spans, ring_pages_per_span()]
  uint8_t* newest = nullptr;          // [num_spans, newest_stride()]: flat rows; 16-byte aligned
  // [num_spans, window + 1]; by ring slot, 1: evict on leaving; the last is newest_evict.
  uint8_t* ring_evict = nullptr;

  int64_t num_spans() const {
    return static_cast<int64_t>(num_layers) * max_sequences * num_kv_heads;
  }
  int slots_per_page() const { return SlotsPerPage(format, head_dim); }
  int ring_pages_per_span() const { return (window + slots_per_page() - 1) / slots_per_page(); }
  int64_t newest_stride() const {
    return static_cast<int64_t>((TokenBytes(format, head_dim) + 15) / 16 * 16);
  }
  int64_t evict_stride() const { return static_cast<int64_t>(window) + 1; }
};

// INVALID_ARGUMENT, in the name of `op`, for a format, shape, null pointer or alignment that is not
// as above, for 2^31 spans or more, or a window or a table of more than 2^30 tokens; UNIMPLEMENTED
// for a head_dim that the format has no tokens of. What lies in device memory is not looked at.
absl::Status ValidateDeviceSpans(const char* op, const DeviceSpans& spans);

}  // namespace winnow::kernels
