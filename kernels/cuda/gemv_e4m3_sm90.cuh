#pragma once

#include "kernels/cuda/gemv_e4m3_shared.cuh"
#include "kernels/cuda/gemv_e4m3_x.cuh"
#include "kernels/cuda/gemv_store.cuh"

// Few rows by e4m3 weights on sm_90a: the codes, as the copy engine stores them, are an operand of
// wgmma. A warp copies w and one x, two warpgroups multiply, the rest make x the other operand and
// finish tiles. Blocks stay; where x does not fit beside a ring, two share a tile, each half of k.
namespace winnow::kernels::internal {

#if WINNOW_SM90A

template <typename S, int kWide>
__device__ __forceinline__ void CopyWeights(const E4m3Block<S, kWide>& b, const CUtensorMap* map) {
  const uint64_t policy = ReadOncePolicy();
  const bool paired = b.a.p.epilogue == GemvEpilogue::kSiluMul;
  const int rows = paired ? S::kRows / 2 : S::kRows;
  ptx::RingPlace stage;
  for (int tile = b.first_tile; tile < b.a.num_tiles; tile += b.tile_step) {
    for (int step = 0; step < b.steps; ++step, stage.Next(b.a.stages)) {
      uint64_t* full = &b.barriers->full[stage.at];
      ptx::BarrierWait(&b.barriers->empty[stage.at], stage.parity ^ 1);
      ptx::BarrierArriveExpect(full, b.kStage);
      uint8_t* to = b.ring + stage.at * b.kStage;
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const int k = (step * kWide + i) * kE4m3Chunk;
        if (b.a.whole_parts) {
          ptx::LoadBox4Once(to, map, full, k, tile * rows, 0, b.rank * S::kUnits, policy);
          to += kE4m3ChunkBytes;
          continue;
        }
        for (int unit = 0; unit < S::kUnits; ++unit) {
          for (int half = 0; half < (paired ? 2 : 1); ++half, to += rows * kE4m3Chunk) {
            ptx::LoadBox2Once(to, map, full, b.FirstK(unit) + k, half * (b.a.p.n / 2) + tile * rows,
                              policy);
          }
        }
      }
    }
  }
}

// What a warp of warpgroup `group` multiplies.
template <typename S, int kWide>
class E4m3Multiplier {
 public:
  static constexpr int kTiles = S::kColumns / 8;

  __device__ __forceinline__ E4m3Multiplier(const E4m3Block<S, kWide>& b, int group, int warp,
                                            int lane)
      : b_(b), group_(group), warp_(warp), lane_(lane) {}

  __device__ __forceinline__ void Run() {
    int i = 0;
#pragma unroll 1
    for (int tile = b_.first_tile; tile < b_.a.num_tiles; tile += b_.tile_step, ++i) {
      const bool wait_x = i == 0 || !b_.held;
      float total[kTiles][2], even[kTiles][2] = {};
#pragma unroll 1
      for (int pass = 0; pass < b_.a.passes; ++pass) {
        float part[kTiles][2] = {};
#pragma unroll 1
        for (int step = b_.pass_steps; step > 0; --step) Multiply(part, wait_x);
          // Parts are added in pairs, and those in pairs.
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float pair = even[n][j] + part[n][j];
            if (pass == 0) total[n][j] = part[n][j];
            if (pass == 1) total[n][j] = pair;
            if (pass == 3) total[n][j] += pair;
            even[n][j] = part[n][j];
          }
        }
      }
      Store(i, total);
    }
  }

 private:
  // Adds a stage's products to `part`.
  __device__ __forceinline__ void Multiply(float (&part)[kTiles][2], bool wait_x) {
    if (wait_x) ptx::BarrierWait(&b_.barriers->x_full[slot_.at], slot_.parity);
    ptx::BarrierWait(&b_.barriers->full[stage_.at], stage_.parity);
    float d[kWide][4 * kTiles];
    const uint64_t w =
        ptx::SwizzledMatrix(b_.ring + stage_.at * b_.kStage + group_ * kE4m3GroupChunk, 0);
    const uint64_t x =
        ptx::SwizzledMatrix(b_.x + slot_.at * b_.kSlot + group_ * (S::kXBytes / kE4m3Groups), 0);
    ptx::WgmmaFence();
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
#pragma unroll
      for (int k = 0; k < kE4m3Chunk / 32; ++k) {
        WgmmaE4m3Ss(d[i], w + 2 * k + i * (kE4m3ChunkBytes >> 4), x + 2 * k + i * (S::kXBytes >> 4),
                    k != 0);
      }
    }
    ptx::WgmmaCommit();
    const float* factors = b_.factors + slot_.at * (kWide * S::kPairs) +
                           group_ * (S::kPairs / kE4m3Groups) + lane_ % 4;
    ptx::WgmmaWait<0>();
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float factor = factors[i * S::kPairs + 4 * n];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float both = d[i][4 * n + 2 * j] + d[i][4 * n + 2 * j + 1];
          part[n][j] = fmaf(both, factor, part[n][j]);
        }
      }
    }
    __syncwarp();
    if (ptx::ArrivesForWarp(lane_)) {
      ptx::BarrierArrive(&b_.barriers->empty[stage_.at]);
      if (!b_.held) ptx::BarrierArrive(&b_.barriers->x_empty[slot_.at]);
    }
    stage_.Next(b_.a.stages);
    slot_.Next(b_.a.slots);
  }

  __device__ __forceinline__ void Store(int i, const float (&total)[kTiles][2]) {
    const int buffer = i % 2, row = (16 * warp_ + lane_ / 4) % S::kRows;
    ptx::BarrierWait(&b_.barriers->sums_empty[buffer], (i / 2 & 1) ^ 1);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int pair = 4 * n + lane_ % 4, slice = pair / S::kM, m = pair % S::kM;
      const bool mine = slice == warp_ * S::kSlices / 4;
      const float* to = b_.sums + buffer * S::kSums +
                        ((group_ * S::kSlices + slice) * S::kM + m) * S::kSumStride + row;
      StoreSharedIf(mine, to, total[n][0]);
      StoreSharedIf(mine, to + 8, total[n][1]);
    }
    __syncwarp();
    if (ptx::ArrivesForWarp(lane_)) ptx::BarrierArrive(&b_.barriers->sums_full[buffer]);
  }

  const E4m3Block<S, kWide>& b_;
  const int group_, warp_, lane_;
  ptx::RingPlace stage_, slot_;
};

// Adds the units' sums up, of a cluster's blocks too, and stores. Thread `e` has up to kValues sums
// of a tile: with kSiluMul gate's and up's of its outputs in turn, else one of each.
template <typename S, int kWide>
class E4m3Finisher {
 public:
  static constexpr int kValues = S::kOutputs > 2 * S::kXThreads ? S::kOutputs / S::kXThreads : 2;

  __device__ __forceinline__ E4m3Finisher(const E4m3Block<S, kWide>& b, int e)
      : b_(b),
        p_(b.a.p),
        e_(e),
        paired_(p_.epilogue == GemvEpilogue::kSiluMul),
        columns_(paired_ ? S::kRows / 2 : S::kRows),
        column_(e & (columns_ - 1)),
        row_(paired_ ? e / (S::kRows / 2) : e / S::kRows),
        row_step_((paired_ ? 2 : 1) * (S::kXThreads / S::kRows)) {
    Load(b.first_tile);
  }

  // The block's tile number `i`, which the units have summed.
  __device__ __forceinline__ void Finish(int tile, int i) {
    const float scale[2] = {scale_[0], scale_[1]};
    float old[kValues], y[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) old[j] = old_[j];
    Load(tile + b_.tile_step);
    ptx::BarrierWait(&b_.barriers->sums_full[i % 2], i / 2 & 1);
#pragma unroll
    for (int j = 0; j < kValues; ++j) y[j] = Has(j) ? Sum(i % 2, Row(j), TileRow(j)) : 0.0f;
    __syncwarp();
    if (ptx::ArrivesForWarp(e_ % 32)) ptx::BarrierArrive(&b_.barriers->sums_empty[i % 2]);
    if (b_.a.cluster > 1 && !Gather(i, y)) return;
    const int column = columns_ * tile + column_;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (paired_ && j % 2 != 0) continue;
      float out = y[j] * scale[0];
      if (paired_) {
        out = GemvSilu(out, y[j + 1 - j % 2] * scale[1]);
      } else if (p_.epilogue == GemvEpilogue::kAdd) {
        out = old[j] + out;
      }
      if (!Has(j) || column >= Columns()) continue;
      StoreGemv(p_, Row(j) * p_.ldo + column, out);
    }
  }

 private:
  __device__ __forceinline__ int Columns() const { return paired_ ? p_.n / 2 : p_.n; }
  // Of value j: its row of x, whether that is one, and its row of the tile.
  __device__ __forceinline__ int Row(int j) const {
    return row_ + (paired_ ? j / 2 : j) * row_step_;
  }
  __device__ __forceinline__ bool Has(int j) const { return Row(j) < p_.m; }
  __device__ __forceinline__ int TileRow(int j) const {
    return column_ + (paired_ ? j % 2 * columns_ : 0);
  }

  // What the epilogue reads besides the sums.
  __device__ __forceinline__ void Load(int tile) {
    const int column = columns_ * tile + column_;
    const bool inside = tile < b_.a.num_tiles && column < Columns();
    scale_[0] = inside ? p_.w_scale[column] : 0.0f;
    scale_[1] = inside && paired_ ? p_.w_scale[p_.n / 2 + column] : 0.0f;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      old_[j] = inside && Has(j) && p_.epilogue == GemvEpilogue::kAdd
                    ? p_.out_f32[Row(j) * p_.ldo + column]
                    : 0.0f;
    }
  }

  __device__ __forceinline__ float Sum(int buffer, int m, int row) const {
    const float* sums = b_.sums + buffer * S::kSums + m * S::kSumStride + row;
    float v[S::kUnits];
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u) v[u] = sums[u * S::kM * S::kSumStride];
#pragma unroll
    for (int width = 1; width < S::kUnits; width *= 2) {
#pragma unroll
      for (int u = 0; u < S::kUnits; u += 2 * width) v[u] += v[u + width];
    }
    return v[0];
  }

  // The sums of both blocks of a cluster, which finish tiles in turn: true in the one whose turn
  // it is, with them in y.
  __device__ __forceinline__ bool Gather(int i, float (&y)[kValues]) {
    const int owner = i % 2, slot = i / 2 % 2, other = 1 - b_.rank;
    const uint32_t parity = i / 4 & 1;
    float* inbox = b_.inbox + slot * S::kOutputs;
    E4m3Barriers* barriers = b_.barriers;
    if (owner != b_.rank) {
      ptx::BarrierWaitCluster(&barriers->inbox_free[slot], parity ^ 1);
      const uint32_t to = ptx::AddressIn(inbox, owner);
      const uint32_t full = ptx::AddressIn(&barriers->inbox_full[slot], owner);
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        if (Has(j)) ptx::StoreAsync(to + 4 * (Row(j) * S::kRows + TileRow(j)), y[j], full);
      }
      return false;
    }
    if (e_ == 0) ptx::BarrierArriveExpect(&barriers->inbox_full[slot], 4 * S::kRows * p_.m);
    ptx::BarrierWaitCluster(&barriers->inbox_full[slot], parity);
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (Has(j)) y[j] += inbox[Row(j) * S::kRows + TileRow(j)];
    }
    // To a block that still waits for it: others may have ended.
    if (i + 4 < b_.Tiles()) {
      ptx::NamedSync(1, S::kXThreads);
      if (e_ == 0) ptx::ArriveIn(ptx::AddressIn(&barriers->inbox_free[slot], other));
      __syncwarp();
    }
    return true;
  }

  const E4m3Block<S, kWide>& b_;
  const GemvParams& p_;
  const int e_;
  const bool paired_;
  const int columns_, column_, row_, row_step_;
  float scale_[2], old_[kValues];
};

template <typename S, int kWide>
__device__ __forceinline__ void FinishE4m3(const E4m3Block<S, kWide>& b, int warp, int lane) {
  ptx::WaitForPredecessors();
  E4m3Finisher<S, kWide> finisher(b, 32 * warp + lane);
  ptx::RingPlace slot;
  int i = 0;
#pragma unroll 1
  for (int tile = b.first_tile; tile < b.a.num_tiles; tile += b.tile_step, ++i) {
#pragma unroll 1
    for (int step = i == 0 || !b.held ? b.steps : 0; step > 0; --step) {
      ptx::BarrierWait(&b.barriers->x_raw[slot.at], slot.parity);
      SplitX<S, kWide>(b.x + slot.at * b.kSlot, b.factors + slot.at * (kWide * S::kPairs), warp,
                       lane);
      ptx::FenceForWgmma();
      __syncwarp();
      if (ptx::ArrivesForWarp(lane)) ptx::BarrierArrive(&b.barriers->x_full[slot.at]);
      slot.Next(b.a.slots);
    }
    finisher.Finish(tile, i);
  }
}
#endif  // WINNOW_SM90A

// Dynamic shared memory: the ring | x | sums | inbox | factors | barriers.
template <typename S, int kWide>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    GemvE4m3Kernel(const __grid_constant__ E4m3Args args, const __grid_constant__ CUtensorMap map,
                   const __grid_constant__ CUtensorMap x_map) {
#if WINNOW_SM90A
  extern __shared__ __align__(1024) uint8_t ring[];
  // By the shuffle the compiler knows that it is a warp's, and keeps addresses in its registers.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ptx::LetDependentsStart();
  uint8_t* x = ring + args.stages * kWide * kE4m3ChunkBytes;
  auto* sums = reinterpret_cast<float*>(x + args.slots * kWide * S::kXBytes);
  float* inbox = sums + 2 * S::kSums;
  float* factors = inbox + 2 * S::kOutputs;
  auto* barriers = reinterpret_cast<E4m3Barriers*>(factors + args.slots * kWide * S::kPairs);
  // The warp that copies w begins before the others; behind it is the one that copies x.
  constexpr int kCopier = kE4m3MathWarps + S::kXWarps;
  if (warp == kCopier) {
    if (lane == 0) ptx::PrefetchMap(&map);
    if (lane < args.stages) {
      ptx::BarrierInit(&barriers->full[lane], 1);
      ptx::BarrierInit(&barriers->empty[lane], kE4m3MathWarps * ptx::kWarpArrivals);
    }
    if (lane < args.slots) {
      ptx::BarrierInit(&barriers->x_raw[lane], 1);
      ptx::BarrierInit(&barriers->x_full[lane], S::kXWarps * ptx::kWarpArrivals);
      ptx::BarrierInit(&barriers->x_empty[lane], kE4m3MathWarps * ptx::kWarpArrivals);
    }
    if (lane < 2) {
      ptx::BarrierInit(&barriers->sums_full[lane], kE4m3MathWarps * ptx::kWarpArrivals);
      ptx::BarrierInit(&barriers->sums_empty[lane], S::kXWarps * ptx::kWarpArrivals);
      ptx::BarrierInit(&barriers->inbox_full[lane], 1);
      ptx::BarrierInit(&barriers->inbox_free[lane], 1);
    }
    ptx::FenceBarrierInit();
    __syncwarp();
    ptx::NamedArrive(2, S::kThreads);
  } else {
    ptx::NamedSync(2, S::kThreads);
  }
  // The fence above has released the barriers.
  if (args.cluster > 1) ptx::ClusterArriveRelaxed();
  const int block = static_cast<int>(blockIdx.x);
  const int pass_steps = args.chunks / kWide;
  const E4m3Block<S, kWide> b{.a = args,
                              .ring = ring,
                              .x = x,
                              .sums = sums,
                              .inbox = inbox,
                              .factors = factors,
                              .barriers = barriers,
                              .rank = block % args.cluster,
                              .first_tile = block / args.cluster,
                              .tile_step = static_cast<int>(gridDim.x) / args.cluster,
                              .pass_steps = pass_steps,
                              .steps = args.passes * pass_steps,
                              .held = args.slots == args.passes * pass_steps};
  if (warp < kE4m3MathWarps) {
    E4m3Multiplier<S, kWide>(b, warp / 4, warp % 4, lane).Run();
  } else if (warp < kE4m3MathWarps + S::kXWarps) {
    if (args.cluster > 1) ptx::ClusterWaitAll();
    FinishE4m3<S, kWide>(b, warp - kE4m3MathWarps, lane);
  } else if (lane == 0) {
    if (warp == kCopier) {
      CopyWeights<S, kWide>(b, &map);
    } else {
      CopyX<S, kWide>(b, &x_map);
    }
  }
  // No block's memory is written after it has ended: it waits for all that is.
  __syncwarp();
  if (args.cluster > 1 && (warp < kE4m3MathWarps || warp >= kCopier)) ptx::ClusterWaitAll();
#endif
}

}  // namespace winnow::kernels::internal
