#pragma once

#include "kernels/cuda/device_spans.h"

namespace winnow::kernels {

// Spans of one layer and sequence that pass validation, all of whose pointers are `memory`, 16-byte
// aligned: for tests of what is refused before anything is enqueued. head_dim 64, two KV heads.
inline DeviceSpans ValidDeviceSpans(uint8_t* memory) {
  auto* ints = reinterpret_cast<int32_t*>(memory);
  return {.head_dim = 64,
          .window = 1,
          .num_layers = 1,
          .max_sequences = 1,
          .num_kv_heads = 2,
          .max_survivor_pages = 4,
          .pages = memory,
          .state = reinterpret_cast<SpanState*>(memory),
          .survivor_pages = ints,
          .ring_pages = ints,
          .newest = memory,
          .ring_evict = memory};
}

}  // namespace winnow::kernels
