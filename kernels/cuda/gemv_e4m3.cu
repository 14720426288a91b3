#include <cuda_runtime.h>

#include <algorithm>

#include "common/base/status_macros.h"
#include "kernels/cuda/gemv_e4m3_sm90.cuh"
#include "kernels/cuda/gemv_launch.cuh"
#include "kernels/cuda/gemv_sm90.h"
#include "kernels/cuda/tensor_map.h"

namespace winnow::kernels::internal {
namespace {

constexpr int kHalfBytes = 112 * 1024;  // of which an SM has two
constexpr int kRingBytes = 96 * 1024;   // at least

// Of w, as CopyWeights() asks for it.
template <typename S>
absl::StatusOr<CUtensorMap> WeightMap(const E4m3Args& a) {
  const bool paired = a.p.epilogue == GemvEpilogue::kSiluMul;
  const auto n = static_cast<uint64_t>(a.p.n), k = static_cast<uint64_t>(a.p.k);
  const uint32_t rows = S::kRows / (paired ? 2 : 1);
  const auto make = [&](std::span<const uint64_t> sizes, std::span<const uint64_t> strides,
                        std::span<const uint32_t> box) {
    return MakeTensorMap(CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_128B,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_128B, a.p.w, sizes, strides, box);
  };
  if (!a.whole_parts) {
    const uint64_t sizes[] = {k, n}, strides[] = {k};
    const uint32_t box[] = {kE4m3Chunk, rows};
    return make(sizes, strides, box);
  }
  // k of a unit, rows, gate and up, units.
  const uint64_t halves = paired ? 2 : 1, units = a.cluster * S::kUnits;
  const uint64_t sizes[] = {k / units, n / halves, halves, units};
  const uint64_t strides[] = {k, n / halves * k, k / units};
  const uint32_t box[] = {kE4m3Chunk, rows, static_cast<uint32_t>(halves), S::kUnits};
  return make(sizes, strides, box);
}

// Of x, as CopyX() asks for it.
template <typename S>
absl::StatusOr<CUtensorMap> XMap(const E4m3Args& a) {
  const auto m = static_cast<uint64_t>(a.p.m), k = static_cast<uint64_t>(a.p.k);
  const auto make = [&](std::span<const uint64_t> sizes, std::span<const uint64_t> strides,
                        std::span<const uint32_t> box) {
    return MakeTensorMap(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_NONE,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, a.p.x, sizes, strides, box);
  };
  const uint64_t row_bytes = 2 * static_cast<uint64_t>(a.p.ldx);
  if (!a.whole_parts) {
    const uint64_t sizes[] = {k, m}, strides[] = {row_bytes};
    const uint32_t box[] = {kE4m3Chunk, S::kM};
    return make(sizes, strides, box);
  }
  // k of a unit, rows, units.
  const uint64_t units = a.cluster * S::kUnits;
  const uint64_t sizes[] = {k / units, m, units}, strides[] = {row_bytes, 2 * (k / units)};
  const uint32_t box[] = {kE4m3Chunk, S::kM, S::kUnits};
  return make(sizes, strides, box);
}

template <typename S, int kWide>
absl::Status Enqueue(const GemvParams& p, int chunks, StreamHandle stream) {
  constexpr int kLeastStages = kRingBytes / (kWide * kE4m3ChunkBytes);
  WINNOW_ASSIGN_OR_RETURN(const int sms, NumSms());
  E4m3Args args{.p = p, .chunks = chunks};
  const bool paired = p.epilogue == GemvEpilogue::kSiluMul;
  const int tile_columns = paired ? S::kRows / 2 : S::kRows;
  args.num_tiles = ((paired ? p.n / 2 : p.n) + tile_columns - 1) / tile_columns;
  args.whole_parts = p.k == kE4m3Parts * chunks * kE4m3Chunk;
  int most = kGemvSharedBytes;
  const auto fits = [&](int stages) {
    return E4m3SharedBytes<S, kWide>(stages, args.slots) <= most;
  };
  // A block a tile, unless half of them would have none or all of x does not fit: two then, each
  // half of k, where a block's groups and slices leave two halves. If that does not fit either, x
  // is in slots that are filled again for each tile.
  bool held = false;
  const int least = S::kPasses > 1 && 2 * args.num_tiles <= sms ? 2 : 1;
  for (int cluster = least; cluster <= std::min(S::kPasses, 2) && !held; ++cluster) {
    args.cluster = cluster;
    args.passes = S::kPasses / cluster;
    args.slots = args.passes * chunks / kWide;
    held = args.slots <= kE4m3MaxSlots && fits(kLeastStages);
  }
  if (!held) {
    args.slots = std::min(args.slots, kE4m3MaxSlots);
    while (args.slots > kE4m3MinSlots && !fits(kLeastStages)) --args.slots;
  }
  // With half the memory the next kernel's blocks fill their rings while these run out.
  if (S::kBlocks == 2 && E4m3SharedBytes<S, kWide>(kLeastStages, args.slots) <= kHalfBytes) {
    most = kHalfBytes;
  }
  args.stages = kE4m3MaxStages / kWide;
  while (!fits(args.stages)) --args.stages;
  // x comes behind the weights that were asked for before it: many rows of it sooner behind fewer.
  if (S::kM > 8 && args.cluster == 1) args.stages = std::min(args.stages, kLeastStages);
  WINNOW_ASSIGN_OR_RETURN(const CUtensorMap map, WeightMap<S>(args));
  WINNOW_ASSIGN_OR_RETURN(const CUtensorMap x_map, XMap<S>(args));
  return LaunchGemvKernel<GemvE4m3Kernel<S, kWide>>(
      args.cluster, args.num_tiles, S::kThreads, E4m3SharedBytes<S, kWide>(args.stages, args.slots),
      stream, args, map, x_map);
}

template <int kM, int kSlices>
absl::Status Enqueue(const GemvParams& p, StreamHandle stream) {
  using S = E4m3Shape<kM, kSlices>;
  const int chunks = (p.k + kE4m3Chunk * kE4m3Parts - 1) / (kE4m3Chunk * kE4m3Parts);
  return chunks % 2 == 0 ? Enqueue<S, 2>(p, chunks, stream) : Enqueue<S, 1>(p, chunks, stream);
}

}  // namespace

absl::Status EnqueueGemvSm90E4m3(const GemvParams& params, StreamHandle stream) {
  if (params.m <= 2) {
    // The larger tile costs less, the smaller ones share few rows of w better.
    WINNOW_ASSIGN_OR_RETURN(const int sms, NumSms());
    if (params.n / 32 > 2 * sms) return Enqueue<2, 2>(params, stream);
    return params.m == 1 ? Enqueue<1, 4>(params, stream) : Enqueue<2, 4>(params, stream);
  }
  if (params.m <= 4) return Enqueue<4, 1>(params, stream);
  if (params.m <= 8) return Enqueue<8, 1>(params, stream);
  return Enqueue<16, 1>(params, stream);
}

}  // namespace winnow::kernels::internal
