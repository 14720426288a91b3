#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/dms_prefill_fp8_plan.cuh"
#include "kernels/cuda/ptx.cuh"

// Prefix + band with FP8 products. A block is one producer warpgroup (one thread issues
// copies) and kConsumers warpgroups of 64 query rows; blocks stay and take tiles by ticket,
// longest first. A row of a tile is (position, head of the group).
// The keys of a tile are one list, in boxes of kBoxKeys and pieces of 16:
//
//   survivors older than the window of every row [0, n) | padding to a multiple of 16 |
//   band rows older than the tile's band, to a multiple of 16 | the band, dense
//
// A score is ks_j * qs * <q codes, k codes>; a weight is 2^(score + log2 vs_j - reference),
// with V's scale vs_j inside, so that e4m3's range is spent on what counts, the product.
// Their sum takes vs_j out again.
//
// This file: what a block's threads share, and the thread that issues copies.
namespace winnow::kernels::internal {

struct PrefillFp8Shape {
  static constexpr int kDim = kPrefillFp8Dim;
  static constexpr int kRows = kFp8TileRows;
  static constexpr int kConsumers = kRows / 64;
  static constexpr int kBoxKeys = 128;
  static constexpr int kStepKeys = 64;  // of one softmax step
  // Keys whose outputs are summed in the tensor cores, which drop low bits.
  static constexpr int kSaveKeys = 8 * kBoxKeys;
  static constexpr int kStages = 3;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = 32;
  static constexpr int kConsumerRegisters = 160;
  // What the producer gives up, from 65536 / kThreads registers, the consumers take.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kLaunchRegisters - kProducerRegisters >=
                kConsumers * (kConsumerRegisters - kLaunchRegisters));
  static constexpr int kBoxBytes = kBoxKeys * kDim;
};

// A tile as the block's threads need it; head < 0: no more tiles.
struct Fp8TileWork {
  int32_t head;
  int32_t num_survivors, padded;  // ends of the list's first two parts
  int32_t band_start, num_keys;   // of the band's part that is the tile's
  int32_t compact_row;            // of the first survivor
  int32_t band_row;               // of list key `padded`
  int32_t query_offset;           // of the first position, from list key `band_start`
  int32_t row;                    // of the first position in q and out
  int32_t num_positions;
};

template <typename Shape>
struct PrefillFp8Shared {
  alignas(128) uint8_t q[Shape::kRows * Shape::kDim];
  alignas(128) uint8_t k[Shape::kStages][Shape::kBoxBytes];
  alignas(128) uint8_t v[Shape::kStages][Shape::kBoxBytes];
  float4 o[16][128 * Shape::kConsumers];  // outputs taken out of the tensor cores, a thread's
  alignas(16) float scales[Shape::kStages][2 * Shape::kBoxKeys];
  alignas(16) float inverses[Shape::kStages][Shape::kBoxKeys];
  alignas(8) uint64_t k_full[Shape::kStages], k_empty[Shape::kStages];
  uint64_t v_full[Shape::kStages], v_empty[Shape::kStages];
  uint64_t work_full[2], work_empty[2];
  Fp8TileWork work[2];
};

struct PrefillFp8Args {
  const DmsPrefillSequence* sequences;
  PrefillScratch scratch;
  DmsPrefillFp8Rows band, compact;
  const Bf16* q;
  int64_t q_stride;
  Bf16* out;
  int num_kv_heads, group, window, band_rows, compact_rows, positions;
  float scale_log2;  // scale * log2(e)
};

// The stages of a ring of boxes: which, and the parity of its current turn.
template <int kStages>
struct Fp8Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

#if WINNOW_SM90A

// Calls copy(rows, first row, first key in the box, keys) for the box's one or two parts.
template <typename Shape, typename Copy>
__device__ __forceinline__ void ForParts(const PrefillFp8Args& args, const Fp8TileWork& w, int box,
                                         Copy copy) {
  const int first = box * Shape::kBoxKeys;
  const int end = min(first + Shape::kBoxKeys, (w.num_keys + 15) & ~15);
  if (first < w.padded) {
    copy(args.compact, int64_t{w.head} * args.compact_rows + w.compact_row + first, 0,
         min(end, w.padded) - first);
  }
  if (end > w.padded) {
    const int from = max(first, w.padded);
    copy(args.band, int64_t{w.head} * args.band_rows + w.band_row + from - w.padded, from - first,
         end - from);
  }
}

template <typename Shape>
__device__ __forceinline__ void LoadKeysFp8(const PrefillFp8Args& args, const Fp8TileWork& w,
                                            int box, PrefillFp8Shared<Shape>& shared, int stage) {
  uint64_t* full = &shared.k_full[stage];
  const int keys = min(Shape::kBoxKeys, ((w.num_keys + 15) & ~15) - box * Shape::kBoxKeys);
  ptx::BarrierArriveExpect(full, static_cast<uint32_t>(keys) * (Shape::kDim + 12));
  ForParts<Shape>(args, w, box, [&](const DmsPrefillFp8Rows& rows, int64_t row, int at, int n) {
    const uint32_t count = static_cast<uint32_t>(n);
    ptx::LoadBytes(shared.k[stage] + at * Shape::kDim, rows.k + row * Shape::kDim,
                   count * Shape::kDim, full);
    ptx::LoadBytes(shared.scales[stage] + 2 * at, rows.scales + 2 * row, count * 8, full);
    ptx::LoadBytes(shared.inverses[stage] + at, rows.inverses + row, count * 4, full);
  });
}

template <typename Shape>
__device__ __forceinline__ void LoadValuesFp8(const PrefillFp8Args& args, const Fp8TileWork& w,
                                              int box, PrefillFp8Shared<Shape>& shared, int stage) {
  uint64_t* full = &shared.v_full[stage];
  const int keys = min(Shape::kBoxKeys, ((w.num_keys + 15) & ~15) - box * Shape::kBoxKeys);
  ptx::BarrierArriveExpect(full, static_cast<uint32_t>(keys) * Shape::kDim);
  ForParts<Shape>(args, w, box, [&](const DmsPrefillFp8Rows& rows, int64_t row, int at, int n) {
    ptx::LoadBytes(shared.v[stage] + at * Shape::kDim, rows.v + row * Shape::kDim,
                   static_cast<uint32_t>(n) * Shape::kDim, full);
  });
}

template <typename Shape>
__device__ __forceinline__ void ProduceFp8(const PrefillFp8Args& args,
                                           PrefillFp8Shared<Shape>& shared) {
  Fp8Ring<Shape::kStages> k, v;
  Fp8Ring<2> work;
  const int num_tiles = *args.scratch.num_tiles;
  while (true) {
    const int ticket = atomicAdd(args.scratch.ticket, 1);
    Fp8TileWork w{.head = -1};
    if (ticket < num_tiles) {
      const PrefillTile tile = args.scratch.tiles[ticket];
      const DmsPrefillSequence s = args.sequences[tile.sequence];
      const int position = s.num_prefix + tile.first;  // in the band
      const int oldest = max(0, position - args.window);
      w.head = tile.head;
      w.num_survivors = tile.num_survivors;
      w.padded = (tile.num_survivors + 15) & ~15;
      w.num_positions = min(args.positions, s.num_tokens - tile.first);
      w.band_start = w.padded + oldest % 16;
      w.num_keys = w.band_start + position + w.num_positions - oldest;
      w.compact_row = s.compact_row;
      w.band_row = s.band_row + oldest / 16 * 16;
      w.query_offset = position - oldest;
      w.row = s.row + tile.first;
    }
    ptx::BarrierWait(&shared.work_empty[work.stage], work.parity ^ 1);
    shared.work[work.stage] = w;
    ptx::BarrierArrive(&shared.work_full[work.stage]);
    work.Next();
    if (w.head < 0) return;

    for (int i = 0; i < w.num_positions; ++i) {
      ptx::PrefetchBytes(args.q + (w.row + i) * args.q_stride + w.head * args.group * Shape::kDim,
                         static_cast<uint32_t>(args.group * Shape::kDim * 2));
    }
    const int boxes = (w.num_keys + Shape::kBoxKeys - 1) / Shape::kBoxKeys;
    for (int box = 0; box <= boxes; ++box) {
      if (box < boxes) {
        ptx::BarrierWait(&shared.k_empty[k.stage], k.parity ^ 1);
        LoadKeysFp8<Shape>(args, w, box, shared, k.stage);
        k.Next();
      }
      if (box > 0) {
        ptx::BarrierWait(&shared.v_empty[v.stage], v.parity ^ 1);
        LoadValuesFp8<Shape>(args, w, box - 1, shared, v.stage);
        v.Next();
      }
    }
  }
}

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
