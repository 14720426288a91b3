#pragma once

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/cuda/device_spans.h"
#include "kernels/cuda/dms_prefill.h"

// The spans of one layer and how a prefill's batch fits them.
namespace winnow::kernels::internal {

// DeviceSpans as kernels of one layer take them: arrays but `pages` start at the layer's
// first span, strides are numbers.
struct LayerSpans {
  uint8_t* pages;
  SpanState* state;
  int32_t* survivor_pages;  // [spans, max_survivor_pages]
  int32_t* ring_pages;      // [spans, ring_pages_per_span]
  uint8_t* newest;          // [spans, newest_stride]
  uint8_t* ring_evict;      // [spans, window + 1]
  int64_t newest_stride;
  int window, max_survivor_pages, ring_pages_per_span;

  __host__ __device__ int evict_stride() const { return window + 1; }
};

inline LayerSpans LayerOf(const DeviceSpans& spans, int layer) {
  const int64_t first = int64_t{layer} * spans.max_sequences * spans.num_kv_heads;
  const bool ring = spans.window > 0;
  return {.pages = spans.pages,
          .state = spans.state + first,
          .survivor_pages = spans.survivor_pages + first * spans.max_survivor_pages,
          .ring_pages = ring ? spans.ring_pages + first * spans.ring_pages_per_span() : nullptr,
          .newest = spans.newest + first * spans.newest_stride(),
          .ring_evict = ring ? spans.ring_evict + first * spans.evict_stride() : nullptr,
          .newest_stride = spans.newest_stride(),
          .window = spans.window,
          .max_survivor_pages = spans.max_survivor_pages,
          .ring_pages_per_span = spans.ring_pages_per_span()};
}

// INVALID_ARGUMENT unless the batch's shape is that of the spans, and what both need is there.
inline absl::Status ValidateLayer(const char* op, const DmsPrefillBatch& batch,
                                  const DeviceSpans& spans, const int32_t* slots, int layer) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillBatch(batch));
  WINNOW_RETURN_IF_ERROR(ValidateDeviceSpans(op, spans));
  if (spans.head_dim != batch.head_dim || spans.num_kv_heads != batch.num_kv_heads ||
      spans.shift != batch.shift || (spans.window != 0 && spans.window != batch.window)) {
    return absl::InvalidArgumentError(absl::StrCat(
        op, ": spans of head_dim=", spans.head_dim, " num_kv_heads=", spans.num_kv_heads,
        " shift=", spans.shift, " window=", spans.window, " are not the batch's"));
  }
  if (layer < 0 || layer >= spans.num_layers) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": layer=", layer));
  }
  if (slots == nullptr) return absl::InvalidArgumentError(absl::StrCat(op, ": slots is null"));
  return absl::OkStatus();
}

}  // namespace winnow::kernels::internal
