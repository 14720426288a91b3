#pragma once

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "kernels/cuda/gemv_copies.cuh"
#include "kernels/cuda/gemv_launch.cuh"
#include "kernels/cuda/gemv_store.cuh"
#include "kernels/cuda/mma_sync.cuh"
#include "kernels/cuda/ptx_cluster.cuh"

// The kernel for BF16 weights. A block an SM, which has an equal share of the rows of w, in tiles
// of 16: it takes all of them through a chunk of k before the next, their sums in registers, so
// that x too is read once, in stages between those of w. A warp has an eighth of each kilobyte,
// through a ring of its own; the warps meet only at the end. k past kGemvSlice is halved between
// the two blocks of a cluster.
namespace winnow::kernels::internal {

inline constexpr int kGemvBf16Threads = 32 * kGemvMathWarps;
inline constexpr int kGemvWarpStage = kGemvStage / kGemvMathWarps;
inline constexpr int kGemvPassTiles = 6;  // whose sums a warp has in registers
inline constexpr int kGemvHeld = 2;       // chunks of x that it has
inline constexpr int kGemvBehindX = 1;    // stages of the first fill that are copied after x
template <bool kPair>
inline constexpr int kGemvDepth = kPair ? 11 : 14;  // stages of a ring
// Floats between rows of w in a warp's sums of a tile: free of bank conflicts.
template <int kTiles>
inline constexpr int kGemvRowFloats = kTiles == 1 ? 8 : 24;
// Of 16 bytes, that the other block of a cluster fills: a lane's sums of every other tile.
template <int kTiles, bool kPair>
inline constexpr int kGemvInboxQuads = kPair ? (kGemvPassTiles + 1) / 2 * kTiles * 32 : 0;

struct GemvBf16Args {
  GemvParams p;
  int units = 0, tile_units = 0;  // rows of w, of kSiluMul columns of out; a tile's
  int num_chunks = 0;             // of a block; a half's last ones may lie past k
};

#if WINNOW_SM90A

// A block's half of k, and units [first, end) in `tiles` tiles, of which a pass takes `pass_tiles`.
struct GemvPart {
  int first, end, tiles, pass_tiles, rank;
};
template <bool kPair>
__device__ __forceinline__ GemvPart PartOf(const GemvBf16Args& a) {
  constexpr int kBlocks = kPair ? 2 : 1;
  const int64_t units = a.units, parts = static_cast<int>(gridDim.x) / kBlocks;
  const int block = static_cast<int>(blockIdx.x), part = block / kBlocks;
  const int first = static_cast<int>(units * part / parts);
  const int end = static_cast<int>(units * (part + 1) / parts);
  const int tiles = (end - first + a.tile_units - 1) / a.tile_units;
  const int passes = (tiles + kGemvPassTiles - 1) / kGemvPassTiles;
  return {.first = first,
          .end = end,
          .tiles = tiles,
          .pass_tiles = (tiles + passes - 1) / passes,
          .rank = block % kBlocks};
}

// A warp's copies, running ahead of the products: for each pass, for each kGemvHeld chunks of k, a
// stage for each of them of x, then of each tile. A lane has 16 bytes of every fourth row.
template <int kTiles>
class GemvStream {
 public:
  __device__ __forceinline__ GemvStream(const GemvBf16Args& a, const GemvPart& part, int warp,
                                        int lane)
      : p_(a.p),
        row_(lane / 8),
        row_bytes_(2 * a.p.k),
        even_(StageAt(row_, lane % 8)),
        odd_(StageAt(row_ + 4, lane % 8)),
        pass_tiles_(part.pass_tiles),
        tile_units_(a.tile_units),
        num_chunks_(a.num_chunks),
        policy_(ReadOncePolicy()),
        tiles_(part.tiles),
        pass_left_(part.end - part.first - row_) {
    const int start =
        part.rank * a.num_chunks * kGemvChunk + warp * kGemvWarpBytes + 16 * (lane % 8);
    const bool paired = p_.epilogue == GemvEpilogue::kSiluMul;
    room_ = row_bytes_ - start;
    second_ = int64_t{paired ? p_.n / 2 : 8} * row_bytes_;
    second_units_ = paired ? 0 : 8;
    x_ = reinterpret_cast<const uint8_t*>(p_.x + row_ * p_.ldx) + start;
    pass_w_ = static_cast<const uint8_t*>(p_.w) + int64_t{part.first + row_} * row_bytes_ + start;
    StartChunks();
  }

  // Passes a stage on, and copies it if it is of a kind asked for. Nothing past the last.
  template <bool kX, bool kW>
  __device__ __forceinline__ void Next(uint32_t to) {
    if (tiles_ <= 0) return;
    const int offset = c_ * kGemvChunk;
    const bool inside = offset < inside_;
    if (tile_ < 0) {
      if constexpr (kX) {
        const uint8_t* from = x_ + chunk_ * kGemvChunk + offset;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          CopyAsync(to + (i % 2 == 0 ? even_ : odd_) + 1024 * (i / 2), from + 8 * i * p_.ldx,
                    inside && row_ + 4 * i < p_.m);
        }
      }
    } else if constexpr (kW) {
      const uint8_t* from = w_ + offset;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* first = from + half * second_;
        const int unit = half * second_units_;
        CopyAsync(to + even_ + 1024 * half, first, inside && unit < left_, policy_);
        CopyAsync(to + odd_ + 1024 * half, first + 4 * row_bytes_, inside && unit + 4 < left_,
                  policy_);
      }
    }
    if (++c_ < held_) return;
    c_ = 0;
    if (++tile_ > 0) {
      w_ += int64_t{tile_units_} * row_bytes_;
      left_ -= tile_units_;
    }
    if (tile_ < min(pass_tiles_, tiles_)) return;
    chunk_ += kGemvHeld;
    if (chunk_ >= num_chunks_) {
      chunk_ = 0;
      tiles_ -= pass_tiles_;
      pass_left_ -= pass_tiles_ * tile_units_;
      pass_w_ += int64_t{pass_tiles_ * tile_units_} * row_bytes_;
    }
    StartChunks();
  }

 private:
  __device__ __forceinline__ void StartChunks() {
    tile_ = -1;
    w_ = pass_w_ + chunk_ * kGemvChunk;
    left_ = pass_left_;
    held_ = min(kGemvHeld, num_chunks_ - chunk_);
    inside_ = room_ - chunk_ * kGemvChunk;
  }

  const GemvParams& p_;
  const int row_, row_bytes_, even_, odd_, pass_tiles_, tile_units_, num_chunks_;
  const uint64_t policy_;
  int tiles_, pass_left_;  // from the pass's first on: tiles; units from the lane's row on
  int room_;               // bytes of a row from the lane's first on
  int second_units_;       // from a tile's upper half to its lower one; bytes:
  int64_t second_;
  const uint8_t *x_, *pass_w_, *w_;
  // In the pass: the first of the chunks at hand, how many, which; bytes of a row and units from
  // there on; the tile, -1: x.
  int chunk_ = 0, held_, c_ = 0, inside_, left_, tile_;
};

// What adds up the sums of 16 rows of w and eight of x: a lane has a row of w (bits 0, 1, 3 and 4
// of the lane) and four of x, of which `rows` are stored, from `at` on.
struct GemvOutput {
  int row, m, rows;
  int64_t at;
};
__device__ __forceinline__ GemvOutput OutputOf(const GemvBf16Args& a, const GemvPart& part,
                                               int tile, int eight, int lane) {
  const bool paired = a.p.epilogue == GemvEpilogue::kSiluMul;
  const int row = lane % 4 + lane / 8 * 4, m = 8 * eight + lane / 4 % 2 * 4;
  const int unit = part.first + tile * a.tile_units + (paired ? row % 8 : row);
  return {.row = row,
          .m = m,
          .rows = unit < part.end && !(paired && row >= 8) ? min(a.p.m - m, 4) : 0,
          .at = m * a.p.ldo + unit};
}

__device__ __forceinline__ void StoreOutput(const GemvParams& p, const GemvOutput& out,
                                            const float (&old)[4], float (&y)[4]) {
  if (p.epilogue == GemvEpilogue::kSiluMul) {
#pragma unroll
    for (float& v : y) {
      const float up = __shfl_down_sync(0xffffffffu, v, 16);
      v = GemvSilu(v, up);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= out.rows) break;
    StoreGemv(p, out.at + j * p.ldo, p.epilogue == GemvEpilogue::kAdd ? old[j] + y[j] : y[j]);
  }
}

struct GemvInbox {
  float4* sums;    // [kGemvInboxQuads]
  uint64_t* full;  // their barrier
  uint32_t parity = 0;
};

// Adds up the warps' sums of `tiles` tiles in `area`, then the halves', and stores.
template <int kTiles, bool kPair>
__device__ __forceinline__ void AddUp(const GemvBf16Args& args, const GemvPart& part, int tile0,
                                      int tiles, const float* area, GemvInbox* inbox) {
  constexpr int kBlocks = kPair ? 2 : 1;
  constexpr int kWarpFloats = kGemvDepth<kPair> * kGemvWarpStage / 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int mine = (tiles + kBlocks - 1 - part.rank) / kBlocks;  // every other tile
  if (kPair && mine > 0 && threadIdx.x == 0) {
    ptx::BarrierArriveExpect(inbox->full, mine * kTiles * 512);
  }
  // What the other block needs goes first.
#pragma unroll 1
  for (int owner = kPair ? part.rank ^ 1 : 0, turn = kPair ? 0 : 1; turn < 2; ++turn, owner ^= 1) {
#pragma unroll 1
    for (int i = warp;; i += kGemvMathWarps) {
      const int tile = i / kTiles * kBlocks + owner;
      if (tile >= tiles) break;
      const GemvOutput out = OutputOf(args, part, tile0 + tile, i % kTiles, lane);
      float old[4] = {};
      if (turn == 1 && args.p.epilogue == GemvEpilogue::kAdd) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j < out.rows) old[j] = args.p.out_f32[out.at + j * args.p.ldo];
        }
      }
      const float* from = area + (tile * 16 + out.row) * kGemvRowFloats<kTiles> + out.m;
      float y[4] = {};
#pragma unroll
      for (int w = 0; w < kGemvMathWarps; ++w) {
        Add4(y, *reinterpret_cast<const float4*>(from + w * kWarpFloats));
      }
      if constexpr (kPair) {
        float4* slot = inbox->sums + i * 32 + lane;
        if (turn == 0) {
          ptx::StoreAsync(ptx::AddressIn(slot, owner), make_float4(y[0], y[1], y[2], y[3]),
                          ptx::AddressIn(inbox->full, owner));
          continue;
        }
        ptx::BarrierWaitCluster(inbox->full, inbox->parity);
        Add4(y, *slot);
      }
      StoreOutput(args.p, out, old, y);
    }
  }
  if (mine > 0) inbox->parity ^= 1;
}

// The end of a pass: all of the ring is free if it is the `last`, else a stage of each warp.
template <int kTiles, bool kPair>
__device__ __forceinline__ void FinishPass(const GemvBf16Args& args, const GemvPart& part,
                                           int tile0, int tiles, bool last, int free_stage,
                                           uint8_t* ring,
                                           const float (&sums)[kGemvPassTiles][kTiles][4],
                                           GemvInbox* inbox) {
  constexpr int kRow = kGemvRowFloats<kTiles>, kTile = 16 * kRow;
  constexpr int kWarpFloats = kGemvDepth<kPair> * kGemvWarpStage / 4;
  static_assert(4 * kTile <= kGemvWarpStage && kTile * kGemvPassTiles <= kWarpFloats);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = last ? tiles : 1;
  auto* area = reinterpret_cast<float*>(ring + (last ? 0 : free_stage * kGemvWarpStage));
  float* to = area + warp * kWarpFloats + lane / 4 * kRow + lane % 4 * 2;
#pragma unroll 1
  for (int first = 0; first < tiles; first += group) {
#pragma unroll
    for (int r = 0; r < kGemvPassTiles; ++r) {
      if (r >= tiles) break;
      if (!last && r != first) continue;
      float* out = to + (last ? r * kTile : 0);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float(&sum)[4] = sums[r][n];
        *reinterpret_cast<float2*>(out + 8 * n) = make_float2(sum[0], sum[1]);
        *reinterpret_cast<float2*>(out + 8 * n + 8 * kRow) = make_float2(sum[2], sum[3]);
      }
    }
    __syncthreads();
    AddUp<kTiles, kPair>(args, part, tile0 + first, group, area, inbox);
    if (last) continue;
    if constexpr (kPair) {  // the inbox is free again, too
      ptx::ClusterArrive();
      ptx::ClusterWaitAll();
    } else {
      __syncthreads();
    }
  }
}

// A warp's ring of kDepth stages, of which kDepth - 1 are under way.
template <int kTiles, int kDepth>
class GemvRing {
 public:
  __device__ __forceinline__ GemvRing(uint8_t* stages, const GemvStream<kTiles>& copies)
      : stages_(ptx::SharedAddress(stages)), copies_(copies) {}

  // Weights first; once x may be read its stages, and kGemvBehindX of the weights' behind them.
  __device__ __forceinline__ void Fill() {
    static_assert(kGemvBehindX > 0);
    GemvStream<kTiles> x = copies_;
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i) {
      if (i == kDepth - 1 - kGemvBehindX) {
        ptx::WaitForPredecessors();
#pragma unroll 1
        for (int j = 0; j < kDepth - 1; ++j) {
          x.template Next<true, false>(stages_ + j * kGemvWarpStage);
        }
        CommitCopies();
      }
      copies_.template Next<false, true>(stages_ + i * kGemvWarpStage);
      CommitCopies();
    }
    WaitCopies<kGemvBehindX>();
  }
  // The next stage, when it has come.
  __device__ __forceinline__ uint32_t Wait() {
    WaitCopies<kDepth - 2>();
    __syncwarp();
    return stages_ + stage_ * kGemvWarpStage;
  }
  // It has been read. What is copied meanwhile goes where the one before it was.
  __device__ __forceinline__ void Pass() {
    copies_.template Next<true, true>(stages_ + Before() * kGemvWarpStage);
    CommitCopies();
    if (++stage_ == kDepth) stage_ = 0;
  }
  __device__ __forceinline__ int Before() const { return stage_ == 0 ? kDepth - 1 : stage_ - 1; }

 private:
  const uint32_t stages_;
  GemvStream<kTiles> copies_;
  int stage_ = 0;
};

// Adds the products of a pass to `sums`.
template <int kTiles, int kDepth>
__device__ __forceinline__ void MultiplyPass(GemvRing<kTiles, kDepth>* ring, int tiles,
                                             int num_chunks, int lane,
                                             float (&sums)[kGemvPassTiles][kTiles][4]) {
  // Of the four matrices of 8 rows by 16 bytes that a load takes: of w two rows by two columns; of
  // x the same turned, or of eight rows four columns.
  const int matrix = lane / 8, line = lane % 8;
  const int read_w = StageAt(line + 8 * (matrix % 2), matrix / 2);
  const int read_x =
      kTiles == 2 ? StageAt(line + 8 * (matrix / 2), matrix % 2) : StageAt(line, matrix);
#pragma unroll 1
  for (int c = 0; c < num_chunks; c += kGemvHeld) {
    const int held = min(kGemvHeld, num_chunks - c);
    uint4 x[kGemvHeld][2 * kTiles];
#pragma unroll
    for (int h = 0; h < kGemvHeld; ++h) {
      if (h >= held) break;
      const uint32_t from = ring->Wait();
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        x[h][j] = device::LoadMatrices(from + (read_x ^ (kTiles == 2 ? 32 : 64) * j));
      }
      ring->Pass();
    }
#pragma unroll
    for (int r = 0; r < kGemvPassTiles; ++r) {
      if (r >= tiles) break;
#pragma unroll
      for (int h = 0; h < kGemvHeld; ++h) {
        if (h >= held) break;
        const uint32_t from = ring->Wait();
        uint4 w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = device::LoadMatrices(from + (read_w ^ 32 * j));
        ring->Pass();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (kTiles == 2) {
            device::MmaBf16(sums[r][0], w[j], x[h][j].x, x[h][j].y);
            device::MmaBf16(sums[r][1], w[j], x[h][j].z, x[h][j].w);
          } else if (j % 2 == 0) {
            device::MmaBf16(sums[r][0], w[j], x[h][j / 2].x, x[h][j / 2].y);
          } else {
            device::MmaBf16(sums[r][0], w[j], x[h][j / 2].z, x[h][j / 2].w);
          }
        }
      }
    }
  }
}
#endif  // WINNOW_SM90A

// Rows of x come in kTiles eights; kPair: k past kGemvSlice. Dynamic shared memory: the rings | the
// inbox.
template <int kTiles, bool kPair>
__global__ void __launch_bounds__(kGemvBf16Threads, 1)
    GemvBf16Kernel(const __grid_constant__ GemvBf16Args args) {
#if WINNOW_SM90A
  constexpr int kDepth = kGemvDepth<kPair>;
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ uint64_t inbox_full;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  ptx::LetDependentsStart();
  GemvInbox inbox{.sums = reinterpret_cast<float4*>(memory + kDepth * kGemvStage),
                  .full = &inbox_full};
  if constexpr (kPair) {
    if (threadIdx.x == 0) {
      ptx::BarrierInit(&inbox_full, 1);
      ptx::FenceBarrierInit();
    }
    __syncwarp();
    ptx::ClusterArrive();
  }
  const GemvPart part = PartOf<kPair>(args);
  GemvRing<kTiles, kDepth> ring(memory + warp * kDepth * kGemvWarpStage,
                                GemvStream<kTiles>(args, part, warp, lane));
  ring.Fill();
  if constexpr (kPair) ptx::ClusterWaitAll();  // before the first message
#pragma unroll 1
  for (int tile0 = 0; tile0 < part.tiles; tile0 += part.pass_tiles) {
    const int tiles = min(part.pass_tiles, part.tiles - tile0);
    float sums[kGemvPassTiles][kTiles][4] = {};
    MultiplyPass<kTiles, kDepth>(&ring, tiles, args.num_chunks, lane, sums);
    FinishPass<kTiles, kPair>(args, part, tile0, tiles, tile0 + tiles >= part.tiles, ring.Before(),
                              memory, sums, &inbox);
  }
#endif
}

template <int kTiles, bool kPair>
absl::Status EnqueueGemvBf16(const GemvBf16Args& args, StreamHandle stream) {
  // At least a tile for a block: x costs as much.
  return LaunchGemvKernel<GemvBf16Kernel<kTiles, kPair>>(
      kPair ? 2 : 1, (args.units + args.tile_units - 1) / args.tile_units, kGemvBf16Threads,
      kGemvDepth<kPair> * kGemvStage + 16 * kGemvInboxQuads<kTiles, kPair>, stream, args);
}

inline GemvBf16Args GemvBf16ArgsOf(const GemvParams& p) {
  const bool paired = p.epilogue == GemvEpilogue::kSiluMul;
  const int chunks = (2 * p.k + kGemvChunk - 1) / kGemvChunk;
  GemvBf16Args args;
  args.p = p;
  args.units = paired ? p.n / 2 : p.n;
  args.tile_units = paired ? 8 : 16;
  args.num_chunks = p.k > kGemvSlice ? (chunks + 1) / 2 : chunks;
  return args;
}

}  // namespace winnow::kernels::internal
