#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/dms_prefill_fp8.h"
#include "kernels/cuda/dms_prefill_fp8_list.cuh"
#include "kernels/cuda/dms_prefill_produce.cuh"
#include "kernels/cuda/ptx.cuh"

// A block of the FP8 prefill (dms_prefill_fp8_sm90.cuh) and its producers.
namespace winnow::kernels::internal {

struct PrefillFp8Shape {
  static constexpr int kDim = kPrefillFp8Dim;
  static constexpr int kChannels = kPrefillFp8Channels;
  static constexpr int kRows = kTileRows<kDim>;
  static constexpr int kConsumers = kRows / 64;
  // Boxes whose outputs are summed in the tensor cores, which drop low bits.
  static constexpr int kSaveBoxes = 16;
  static constexpr int kStages = 3;
  static constexpr int kThreads = 128 * (kConsumers + 2);
  static constexpr int kProducerRegisters = 48;
  static constexpr int kConsumerRegisters = 208;
  static constexpr uint32_t kKeyBytes = kBoxKeys * kDim;
  static constexpr uint32_t kValueBytes = kBoxKeys * kChannels;
};

template <typename Shape>
struct PrefillFp8Shared {
  alignas(128) uint8_t q[2][Shape::kRows * Shape::kDim];
  alignas(128) uint8_t k[Shape::kStages][Shape::kKeyBytes];
  alignas(128) uint8_t v[Shape::kStages][Shape::kValueBytes];
  float4 o[16][128 * Shape::kConsumers];  // outputs taken out of the tensor cores, a thread's
  alignas(16) uint16_t scales[Shape::kStages][2 * kBoxKeys];
  float q_unit[2][Shape::kRows];  // what a code of 1 stands for
  alignas(8) uint64_t q_full[2];
  uint64_t k_full[Shape::kStages], k_empty[Shape::kStages];
  uint64_t v_full[Shape::kStages], v_empty[Shape::kStages];
  uint64_t list_full[2], work_full[2], work_empty[2];  // of work alone, and of seen too
  alignas(16) Fp8TileWork work[2];
  alignas(16) uint32_t seen[2][MaxFp8EdgeBoxes(Shape::kRows)][Shape::kRows][4];
};

struct PrefillFp8Args {
  const DmsPrefillSequence* sequences;
  PrefillScratch scratch;
  DmsPrefillFp8Rows band, compact;
  const Bf16* q;
  int64_t q_stride;
  Bf16* out;
  int num_kv_heads, group, window, band_rows, compact_rows, positions;
  float exponent_scale;  // scale * log2(e) * kFp8PerOctave
  int least_q_exponent;  // of a row's largest query, as float32 has it; smaller ones count as it
};

#if WINNOW_SM90A

// The block's tiles, one after another, by a warp.
template <typename Shape>
__device__ __forceinline__ void ScheduleFp8(const PrefillFp8Args& args,
                                            PrefillFp8Shared<Shape>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_tiles = *args.scratch.num_tiles;
  int ticket = static_cast<int>(blockIdx.x);
  for (int tile = 0;; ++tile) {
    const Place<2> place(tile);
    Fp8TileWork& w = shared.work[place.at];
    ptx::BarrierWait(&shared.work_empty[place.at], place.parity ^ 1);
    const bool end = ticket >= num_tiles;
    Fp8TileWork list{.head = kEndOfTiles};
    if (!end) {
      const PrefillTile next = args.scratch.tiles[ticket];
      list = MakeFp8TileWork(next, args.sequences[next.sequence], args.positions, args.window);
    }
    if (lane == 0) w = list;
    ticket = HandOut(args, shared, place.at, !end, ticket);
    if (end) return;
  }
}

// Calls copy(rows, first row, first key in the box, keys) for the parts of a box of the list.
template <typename Copy>
__device__ __forceinline__ void ForParts(const PrefillFp8Args& args, const Fp8TileWork& w,
                                         int first, Copy copy) {
  const int end = min(first + kBoxKeys, RoundUpTo16(w.num_keys));
  for (int key = first; key < end;) {
    const DmsPrefillFp8Rows* rows = &args.band;
    int row = w.old_row + key, part_end = w.new_at, head_rows = args.band_rows;
    if (key >= w.survivors_at) {
      rows = &args.compact;
      row = w.compact_row + key - w.survivors_at;
      part_end = end;
      head_rows = args.compact_rows;
    } else if (key >= w.edge_end) {
      row = w.middle_row + key - w.edge_end;
      part_end = w.survivors_at;
    } else if (key >= w.new_at) {
      row = w.new_row + key - w.new_at;
      part_end = w.edge_end;
    }
    const int n = min(part_end, end) - key;
    copy(*rows, int64_t{w.head} * head_rows + row, key - first, n);
    key += n;
  }
}

// Issues the copies of all tiles' keys or those of the values; one thread.
template <typename Shape, bool kValues>
__device__ __forceinline__ void ProduceFp8(const PrefillFp8Args& args,
                                           PrefillFp8Shared<Shape>& shared) {
  constexpr int kRowBytes = kValues ? Shape::kChannels : Shape::kDim;
  constexpr int kAllBytes = kValues ? kRowBytes : kRowBytes + 4;
  ptx::RingPlace ring;
  for (int tile = 0;; ++tile) {
    const Place<2> place(tile);
    ptx::BarrierWait(&shared.list_full[place.at], place.parity);
    const Fp8TileWork& w = shared.work[place.at];
    if (w.head < 0) return;
    for (int first = 0; first < w.num_keys; first += kBoxKeys, ring.Next(Shape::kStages)) {
      uint8_t* to = kValues ? shared.v[ring.at] : shared.k[ring.at];
      uint64_t* full = kValues ? &shared.v_full[ring.at] : &shared.k_full[ring.at];
      ptx::BarrierWait(kValues ? &shared.v_empty[ring.at] : &shared.k_empty[ring.at],
                       ring.parity ^ 1);
      const int keys = min(kBoxKeys, RoundUpTo16(w.num_keys) - first);
      ptx::BarrierArriveExpect(full, static_cast<uint32_t>(keys * kAllBytes));
      ForParts(args, w, first, [&](const DmsPrefillFp8Rows& rows, int64_t row, int at, int n) {
        const uint8_t* from = (kValues ? rows.v : rows.k) + row * kRowBytes;
        ptx::LoadBulk(to + at * kRowBytes, from, static_cast<uint32_t>(n * kRowBytes), full);
        if constexpr (!kValues) {
          ptx::LoadBulk(shared.scales[ring.at] + 2 * at, rows.scales + 2 * row,
                        static_cast<uint32_t>(n * 4), full);
        }
      });
    }
    ptx::BarrierArrive(&shared.work_empty[place.at]);
  }
}

// Eight rows of a tile's queries to e4m3, the largest code of a row in [1/2, 1), rows of
// nobody as zeros, one with a value that is not finite as NaNs. A warp.
template <typename Shape>
__device__ __forceinline__ void QuantizeRows(const PrefillFp8Args& args, const Fp8TileWork& w,
                                             int first_row, uint8_t* codes, float* units) {
  constexpr int kLoads = 4;
  const int lane = static_cast<int>(threadIdx.x) % 32, column = lane % 16;
  uint4 x[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = first_row + 2 * i + lane / 16, position = row / args.group;
    x[i] = make_uint4(0, 0, 0, 0);
    if (position < w.num_positions) {
      const int head = w.head * args.group + row - position * args.group;
      x[i] = *reinterpret_cast<const uint4*>(args.q + (w.row + position) * args.q_stride +
                                             head * Shape::kDim + 8 * column);
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const uint32_t pairs[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
    uint32_t largest = 0;  // of the upper and of the lower halves
#pragma unroll
    for (const uint32_t pair : pairs) largest = __vmaxu2(largest, pair & 0x7fff7fffu);
    largest = max(largest >> 16, largest & 0xffff);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    }
    const int exponent = min(max(static_cast<int>(largest >> 7), args.least_q_exponent), 252);
    const uint32_t scale_bits = static_cast<uint32_t>(253 - exponent) << 23;
    const float scale = __uint_as_float(largest < 0x7f80 ? scale_bits : 0x7fffffffu);
    float y[8];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      y[2 * n] = scale * __uint_as_float(pairs[n] << 16);
      y[2 * n + 1] = scale * __uint_as_float(pairs[n] & 0xffff0000u);
    }
    const int row = first_row + 2 * i + lane / 16;
    *reinterpret_cast<uint2*>(codes + row / 8 * 1024 + column / 2 * 128 + row % 8 * 16 +
                              column % 2 * 8) =
        make_uint2(ptx::PackE4m3(y[0], y[1], y[2], y[3]), ptx::PackE4m3(y[4], y[5], y[6], y[7]));
    if (column == 0) units[row] = __uint_as_float(static_cast<uint32_t>(exponent + 1) << 23);
  }
}

// The queries of all tiles, by a warpgroup.
template <typename Shape>
__device__ __forceinline__ void QuantizeQueries(const PrefillFp8Args& args,
                                                PrefillFp8Shared<Shape>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
  for (int tile = 0;; ++tile) {
    const Place<2> place(tile);
    ptx::BarrierWait(&shared.list_full[place.at], place.parity);
    const Fp8TileWork& w = shared.work[place.at];
    if (w.head < 0) return;
#pragma unroll 1
    for (int row = 8 * warp; row < Shape::kRows; row += 32) {
      QuantizeRows<Shape>(args, w, row, shared.q[place.at], shared.q_unit[place.at]);
    }
    ptx::FenceForWgmma();
    __syncwarp();
    if (ptx::ArrivesForWarp(static_cast<int>(threadIdx.x) % 32)) {
      ptx::BarrierArrive(&shared.q_full[place.at]);
      ptx::BarrierArrive(&shared.work_empty[place.at]);
    }
  }
}

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
