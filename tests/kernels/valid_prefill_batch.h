#pragma once

#include "kernels/cuda/dms_prefill.h"

namespace winnow::kernels {

// A small batch that passes validation, all of whose pointers are `memory`: for tests of what
// is refused before anything is enqueued. head_dim 64, two KV heads.
inline DmsPrefillBatch ValidPrefillBatch(uint8_t* memory) {
  auto* values = reinterpret_cast<Bf16*>(memory);
  return {.sequences = reinterpret_cast<DmsPrefillSequence*>(memory),
          .band_k = values,
          .band_v = values,
          .compact_k = values,
          .compact_v = values,
          .scratch = memory,
          .batch = 1,
          .num_kv_heads = 2,
          .group = 3,
          .head_dim = 64,
          .window = 1,
          .num_rows = 5,
          .band_rows = 6,
          .compact_rows = 14,
          .max_band = 6};
}

}  // namespace winnow::kernels
