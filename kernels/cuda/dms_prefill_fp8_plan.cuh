#pragma once

#include "kernels/cuda/dms_prefill_fp8.h"
#include "kernels/cuda/dms_prefill_plan.cuh"

// What the two FP8 prefill ops share on the device, beside dms_prefill_plan.cuh.
namespace winnow::kernels::internal {

inline constexpr int kFp8TileRows = 192;
inline int Fp8TilePositions(int group) { return kFp8TileRows / group; }
inline int MaxFp8Tiles(const DmsPrefillBatch& b) {
  const int positions = Fp8TilePositions(b.group);
  return ((b.num_rows + positions - 1) / positions + b.batch) * b.num_kv_heads;
}

}  // namespace winnow::kernels::internal
