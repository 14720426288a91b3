#pragma once

#include <cuda.h>

#include "kernels/cuda/dms_prefill_list.cuh"
#include "kernels/cuda/dms_prefill_plan.cuh"
#include "kernels/cuda/ptx.cuh"

// A block of the prefill kernel for sm_90a (dms_prefill_sm90.cuh) and its producers.
namespace winnow::kernels::internal {

template <int kDim_>
struct PrefillShape {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kTileRows<kDim>;
  static constexpr int kConsumers = kRows / 64;
  static constexpr int kStages = kDim == 64 ? 4 : 2;  // a power of two
  static constexpr int kHalves = kDim / 64;           // 64-column pieces of a row
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr uint32_t kQueryBytes = kRows * kDim * 2;
  static constexpr uint32_t kBoxBytes = kBoxKeys * kDim * 2;
};

// Sums of weights below it stay finite times any value of a one-byte format (65504 * 448 < 2^25),
// and times BF16 values below 2^63.
inline constexpr float kMostSum = 0x1p64f;

template <typename Shape>
struct PrefillShared {
  alignas(1024) uint8_t q[2][Shape::kQueryBytes];
  alignas(1024) uint8_t k[Shape::kStages][Shape::kBoxBytes];
  alignas(1024) uint8_t v[Shape::kStages][Shape::kBoxBytes];
  alignas(8) uint64_t q_full[2];
  uint64_t k_full[Shape::kStages], k_empty[Shape::kStages];
  uint64_t v_full[Shape::kStages], v_empty[Shape::kStages];
  uint64_t list_full[2], work_full[2], work_empty[2];  // of work alone, and of seen too
  int32_t redo[2];                                     // the tile is to be done again
  alignas(16) TileWork work[2];
  alignas(16) uint32_t seen[2][MaxEdgeBoxes(Shape::kRows)][Shape::kRows][4];
};

// Boxes of 8 << i rows of one tensor; those of 128 take all of a row's columns.
struct RowMaps {
  CUtensorMap by[5];
};

struct PrefillMaps {
  CUtensorMap q;
  RowMaps band_k, band_v, compact_k, compact_v;
};

// What a kernel needs beside the maps.
struct PrefillKernelArgs {
  const DmsPrefillSequence* sequences;
  PrefillScratch scratch;
  Bf16* out;
  int num_kv_heads, group, window, band_rows, positions;
  float scale_log2;  // scale * log2(e)
};

#if WINNOW_SM90A

// Place of number `n` in a ring of kPlaces (a power of two), and the parity of its turn.
template <int kPlaces>
struct Place {
  int at;
  uint32_t parity;
  __device__ __forceinline__ explicit Place(int n)
      : at(n & (kPlaces - 1)), parity(static_cast<uint32_t>(n / kPlaces) & 1) {}
};

// Hands shared.work[at] to the block, and of a fresh tile what its rows see, found meanwhile
// with the next ticket. Returns the ticket to go on with. All lanes of the planning warp.
template <typename Args, typename Shared>
__device__ __forceinline__ int HandOut(const Args& args, Shared& shared, int at, bool fresh,
                                       int ticket) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto& w = shared.work[at];
  __syncwarp();
  if (lane == 0) ptx::BarrierArrive(&shared.list_full[at]);
  if (fresh) {
    if (lane == 0) ticket = static_cast<int>(gridDim.x) + atomicAdd(args.scratch.ticket, 1);
    FindSeen(w, args.scratch.marks + int64_t{w.head} * args.band_rows, args.window,
             shared.seen[at]);
    ticket = __shfl_sync(~0u, ticket, 0);
  }
  __syncwarp();
  if (ptx::ArrivesForWarp(lane)) ptx::BarrierArrive(&shared.work_full[at]);
  return ticket;
}

// The block's tiles, one after another, by a warp. After the last ticket consumers are
// let run dry, since only then is it known whether that tile must be done again.
template <typename Shape>
__device__ __forceinline__ void Schedule(const PrefillKernelArgs& args,
                                         PrefillShared<Shape>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_tiles = *args.scratch.num_tiles;
  int ticket = static_cast<int>(blockIdx.x);
  bool dry = false;
  for (int tile = 0;; ++tile) {
    const Place<2> place(tile);
    TileWork& w = shared.work[place.at];
    ptx::BarrierWait(&shared.work_empty[place.at], place.parity ^ 1);
    const bool again = shared.redo[place.at] != 0;
    __syncwarp();
    bool fresh = false, end = false;
    if (again) {
      if (lane == 0) {
        shared.redo[place.at] = 0;
        w.careful = 1;
      }
    } else if (!dry && ticket < num_tiles) {
      fresh = true;
      const PrefillTile next = args.scratch.tiles[ticket];
      const TileWork list =
          MakeTileWork(next, args.sequences[next.sequence], args.positions, args.window);
      if (lane == 0) w = list;
    } else {
      end = dry;
      if (lane == 0) w.head = dry ? kEndOfTiles : kEndOfRun;
      dry = true;
    }
    ticket = HandOut(args, shared, place.at, fresh, ticket);
    if (end) return;
  }
}

// One box of the list, in pieces if it is not all of one part.
template <typename Shape>
__device__ __forceinline__ void LoadBox(const TileWork& w, int first, const RowMaps& compact,
                                        const RowMaps& band, int no_row, uint8_t* to,
                                        uint64_t* full) {
  ptx::BarrierArriveExpect(full, Shape::kBoxBytes);
  for (int done = 0; done < kBoxKeys;) {
    const int key = first + done;
    const RowMaps* maps = &band;
    int row = no_row, available = kBoxKeys;  // past the list: zeros
    if (key < w.new_at) {
      row = w.band_row + key;
      available = w.new_at - key;
    } else if (key < w.edge_end) {
      row = w.new_row + key - w.new_at;
      available = w.edge_end - key;
    } else if (key < w.survivors_at) {
      row = w.band_row + w.num_old + key - w.edge_end;
      available = w.survivors_at - key;
    } else if (key < w.num_keys) {
      maps = &compact;
      row = w.compact_row + key - w.survivors_at;
      available = RoundUpTo8(w.num_keys - key);
    }
    const int rows_log2 = 31 - __clz(min(available, kBoxKeys - done));
    const CUtensorMap* map = &maps->by[rows_log2 - 3];
    uint8_t* at = to + done * 128;
    done += 1 << rows_log2;
    ptx::LoadBox4(at, map, full, 0, row, 0, w.head);
    if (Shape::kHalves == 2 && rows_log2 < 7) {
      ptx::LoadBox4(at + kBoxKeys * 128, map, full, 0, row, 1, w.head);
    }
  }
}

// Issues the copies of all tiles' keys and queries, or those of the values; one thread.
template <typename Shape, bool kValues>
__device__ __forceinline__ void Produce(const PrefillKernelArgs& args, const PrefillMaps& maps,
                                        PrefillShared<Shape>& shared) {
  int n = 0;  // boxes so far
  for (int tile = 0;; ++tile) {
    const Place<2> place(tile);
    ptx::BarrierWait(&shared.list_full[place.at], place.parity);
    const TileWork& w = shared.work[place.at];
    if (w.head == kEndOfTiles) return;
    if (w.head >= 0) {
      if constexpr (!kValues) {
        const uint32_t rows = static_cast<uint32_t>(args.positions * args.group);
        ptx::BarrierArriveExpect(&shared.q_full[place.at], rows * Shape::kDim * 2);
#pragma unroll
        for (int half = 0; half < Shape::kHalves; ++half) {
          ptx::LoadBox3(shared.q[place.at] + half * Shape::kRows * 128, &maps.q,
                        &shared.q_full[place.at], 64 * half, w.head * args.group, w.row);
        }
      }
      for (int first = 0; first < w.num_keys; first += kBoxKeys, ++n) {
        const Place<Shape::kStages> stage(n);
        if constexpr (kValues) {
          ptx::BarrierWait(&shared.v_empty[stage.at], stage.parity ^ 1);
          LoadBox<Shape>(w, first, maps.compact_v, maps.band_v, args.band_rows, shared.v[stage.at],
                         &shared.v_full[stage.at]);
        } else {
          ptx::BarrierWait(&shared.k_empty[stage.at], stage.parity ^ 1);
          LoadBox<Shape>(w, first, maps.compact_k, maps.band_k, args.band_rows, shared.k[stage.at],
                         &shared.k_full[stage.at]);
        }
      }
    }
    ptx::BarrierArrive(&shared.work_empty[place.at]);
  }
}

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
