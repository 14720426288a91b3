#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "absl/status/statusor.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/gemv_copies.cuh"
#include "kernels/cuda/gemv_device.cuh"
#include "kernels/cuda/gemv_launch.cuh"
#include "kernels/cuda/gemv_sm90.h"
#include "kernels/cuda/mma_sync.cuh"

// The kernel for e4m3 weights. A block an SM. Eight warps take an eighth of each kilobyte of a
// tile's rows, each through a ring of its own that needs no barrier between warps. One warp copies
// x, two add the warps' sums up and store. k is summed in at most eight slices of kGemvSlice. Where
// x fits in shared memory, a block does all of them; else each is a block of a cluster, which keeps
// its part of x, and the blocks' sums meet in the memory of one of them. The sum's order is the
// same either way.
namespace winnow::kernels::internal {

#if WINNOW_SM90A

// A warp's part of a slice of x to float16, in place: rows times a power of two that brings
// their largest in the part to [2^14, 2^15), so that BF16 values are exact down to 2^-28 of it and
// off by 2^-39 of it below. `inverse` [16]: by what the sums must be multiplied. Half a warp has a
// row; kRows of its rows are under way.
template <int kRows>
__device__ __forceinline__ void ToHalf(const GemvArgs& a, uint8_t* x, int first_k, int num_chunks,
                                       int warp, int lane, float* inverse) {
  constexpr int kMost = kGemvSlice / kGemvChunk;
  const int first = warp * kGemvWarpBytes + 8 * (lane % 16);
#pragma unroll 1
  for (int rows = 0; rows < a.p.m; rows += 2 * kRows) {
    uint4 v[kRows][kMost];
    uint32_t top[kRows] = {};
    const auto row = [&](int i) { return rows + 2 * i + lane / 16; };
    const auto at = [&](int i, int c) {
      return reinterpret_cast<uint4*>(x + row(i) * a.x_stride + 2 * (c * kGemvChunk + first));
    };
    const auto inside = [&](int i, int c) {
      return row(i) < a.p.m && c < num_chunks && first_k + c * kGemvChunk + first < a.p.k;
    };
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int c = 0; c < kMost; ++c) v[i][c] = inside(i, c) ? *at(i, c) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int c = 0; c < kMost; ++c) {
        for (const uint32_t w : {v[i][c].x, v[i][c].y, v[i][c].z, v[i][c].w}) {
          top[i] = __vmaxu2(top[i], w & 0x7fff7fffu);
        }
      }
      top[i] = max(top[i] >> 16, top[i] & 0xffffu);
    }
#pragma unroll
    for (int step = 1; step < 16; step *= 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        top[i] = max(top[i], __shfl_xor_sync(0xffffffffu, top[i], step));
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int shift = min(141 - static_cast<int>(top[i] >> 7), 126);
      const float scale = __int_as_float((127 + shift) << 23);
      if (lane % 16 == 0 && row(i) < a.p.m) {
        inverse[row(i)] = __int_as_float((127 - shift) << 23);
      }
#pragma unroll
      for (int c = 0; c < kMost; ++c) {
        uint32_t words[4] = {v[i][c].x, v[i][c].y, v[i][c].z, v[i][c].w};
#pragma unroll
        for (uint32_t& w : words) {
          const float low = __uint_as_float(w << 16), high = __uint_as_float(w & 0xffff0000u);
          asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high * scale), "f"(low * scale));
        }
        if (inside(i, c)) *at(i, c) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
  __syncwarp();
}

// Adds 16 rows of w, 64 bytes of each (32 BF16 or 64 e4m3), times x to `sums`. A lane has 16
// bytes of rows lane / 4 and lane / 4 + 8, and of x the same k: which k a lane's registers hold
// may be permuted as long as both operands agree.
template <int kTiles>
__device__ __forceinline__ void MultiplyStep(float (&sums)[kTiles][4], const uint4& lo,
                                             const uint4& hi, const uint8_t* const (&x)[kTiles],
                                             int at, bool inside) {
  const uint32_t low[4] = {lo.x, lo.y, lo.z, lo.w}, high[4] = {hi.x, hi.y, hi.z, hi.w};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 a[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t l = low[2 * half + i], h = high[2 * half + i];
      a[i] = make_uint4(device::E4m3PairToF16<0>(l), device::E4m3PairToF16<0>(h),
                        device::E4m3PairToF16<1>(l), device::E4m3PairToF16<1>(h));
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint4 b = LoadShared(x[n] + at + 16 * half, inside);
      device::MmaF16(sums[n], a[0], b.x, b.y);
      device::MmaF16(sums[n], a[1], b.z, b.w);
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void PrepareX(const GemvArgs& a, const GemvShare& share, uint8_t* x,
                                         float (*inverse)[kMaxGemvRows], GemvBarriers* barriers,
                                         int warp, int lane) {
  const int size = min(share.num_chunks * kGemvChunk, a.p.k - share.first_chunk * kGemvChunk);
  for (int i = 0; i * kGemvXPiece < size; ++i) ptx::BarrierWait(&barriers->x_full[i], 0);
#pragma unroll 1
  for (int v = 0; v < share.num_slices; ++v) {
    const int chunk = SliceStart(a, share.first_slice + v);
    ToHalf<kTiles>(a, x + 2 * (chunk - share.first_chunk) * kGemvChunk, chunk * kGemvChunk,
                   SliceStart(a, share.first_slice + v + 1) - chunk, warp, lane,
                   inverse[v * kGemvMathWarps + warp]);
  }
}

template <int kTiles, int kDepth>
__device__ __forceinline__ void Multiply(const GemvArgs& a, const GemvShare& share,
                                         const uint8_t* ring, uint8_t* x, float* sums_out,
                                         float (*inverse)[kMaxGemvRows], GemvBarriers* barriers,
                                         int warp, int lane) {
  constexpr int kXBytes = 2;  // of x for a byte of w
  constexpr int kWarpStage = kGemvStage / kGemvMathWarps;
  const int g = lane / 4, t = lane % 4;
  const int start = warp * kGemvWarpBytes + 16 * t;
  const int row_bytes = a.p.k - share.first_chunk * kGemvChunk;
  const uint8_t* mine = ring + warp * kDepth * kWarpStage;
  WeightCopies copies(a, share, warp, lane);
  // What is done once is kept short, as a product of few bytes waits for its instructions.
#pragma unroll 1
  for (int i = 0; i < kDepth - 1; ++i) copies.Next(ptx::SharedAddress(mine + i * kWarpStage));
  if (a.cluster * a.sharers > 1) ClusterWaitAll();
  PrepareX<kTiles>(a, share, x, inverse, barriers, warp, lane);
  // Columns past m repeat the last: nobody reads them, and no memory need be cleared.
  const uint8_t* x_row[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    x_row[n] = x + min(g + 8 * n, a.p.m - 1) * a.x_stride + kXBytes * start;
  }
  const int read = StageAt(g, t);
  int i = 0, stage = 0;
  for (int tile = share.first_tile; tile < a.num_tiles; tile += share.tile_step) {
    int c = 0;
    for (int v = 0; v < share.num_slices; ++v, ++i) {
      const int end = share.num_slices == 1
                          ? share.num_chunks
                          : SliceStart(a, share.first_slice + v + 1) - share.first_chunk;
      float sums[kTiles][4] = {};
      for (; c < end; ++c) {
        WaitCopies<kDepth - 2>();
        __syncwarp();
        const uint8_t* w = mine + stage * kWarpStage;
        uint4 lo[kGemvSteps], hi[kGemvSteps];
#pragma unroll
        for (int step = 0; step < kGemvSteps; ++step) {
          lo[step] = LoadShared(w + (read ^ 64 * step), true);
          hi[step] = LoadShared(w + (read ^ 64 * step) + 1024, true);
        }
        copies.Next(ptx::SharedAddress(mine + (stage == 0 ? kDepth - 1 : stage - 1) * kWarpStage));
        if (++stage == kDepth) stage = 0;
#pragma unroll
        for (int step = 0; step < kGemvSteps; ++step) {
          const int at = c * kGemvChunk + 64 * step;
          MultiplyStep<kTiles>(sums, lo[step], hi[step], x_row, kXBytes * at,
                               start + at < row_bytes);
        }
      }
      constexpr int kBuffers = kGemvSumBuffers<kTiles>;
      const int buffer = i % kBuffers;
      ptx::BarrierWait(&barriers->sums_empty[buffer], (i / kBuffers & 1) ^ 1);
      float* out =
          sums_out + buffer * kGemvBufferFloats<kTiles> + warp * 8 * kTiles * kGemvSumStride;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float* factors = inverse[v * kGemvMathWarps + warp] + 8 * n + 2 * t;
        const float even = factors[0], odd = factors[1];
        float* to = out + (8 * n + 2 * t) * kGemvSumStride + g;
        to[0] = sums[n][0] * even;
        to[kGemvSumStride] = sums[n][1] * odd;
        to[8] = sums[n][2] * even;
        to[kGemvSumStride + 8] = sums[n][3] * odd;
      }
      __syncwarp();
      if (ptx::ArrivesForWarp(lane)) ptx::BarrierArrive(&barriers->sums_full[buffer]);
    }
  }
}

// The sums of the cluster's blocks for tile number `i` of theirs: true in the block that owns
// it, with all blocks' sums in y, added in order.
__device__ __forceinline__ bool GatherSums(const GemvArgs& a, int rank, int i, float4* inbox,
                                           GemvBarriers* barriers, int e, float (&y)[4]) {
  constexpr int kQuads = kMaxGemvRows * device::kGemvTileRows / 4;
  const int blocks = a.cluster, owner = i % blocks;
  const bool mine = e / 4 < a.p.m;
  const int use = i / blocks, slot = use & 1;
  const uint32_t parity = (use >> 1) & 1;
  float4* slot_inbox = inbox + slot * blocks * kQuads;
  if (owner != rank) {
    ClusterWait(&barriers->inbox_free[owner][slot], parity ^ 1);
    if (mine) {
      StoreAsync(AddressIn(slot_inbox + rank * kQuads + e, owner), y,
                 AddressIn(&barriers->inbox_full[slot], owner));
    }
    return false;
  }
  if (e == 0) ptx::BarrierArriveExpect(&barriers->inbox_full[slot], (blocks - 1) * a.p.m * 64);
  ClusterWait(&barriers->inbox_full[slot], parity);
  float sum[4] = {};
  if (mine) {
    for (int r = 0; r < blocks; ++r) {
      Add4(sum, r == rank ? make_float4(y[0], y[1], y[2], y[3]) : slot_inbox[r * kQuads + e]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) y[j] = sum[j];
  ptx::NamedSync(1, 64);
  if (e < blocks && e != rank) ArriveIn(AddressIn(&barriers->inbox_free[owner][slot], e));
  __syncwarp();
  return true;
}

// The scales of a warp's tiles, copied ahead: behind the weights under way a load takes longer
// than a tile. `ring` [kGemvScaleTiles, 16] is the warp's own.
class ScaleCopies {
 public:
  __device__ __forceinline__ ScaleCopies(const GemvParams& p, int tile, int step, int num_tiles,
                                         int lane, float* ring)
      : p_(p), step_(step), num_tiles_(num_tiles), lane_(lane), ring_(ring), tile_(tile) {
#pragma unroll 1
    for (int i = 0; i < kGemvScaleTiles - 1; ++i) Copy();
  }

  // The next tile's, of rows 4 * quad to 4 * quad + 3.
  __device__ __forceinline__ void Next(int quad, float (&scale)[4]) {
    Copy();
    WaitCopies<kGemvScaleTiles - 1>();
    __syncwarp();
    const float4 v =
        *reinterpret_cast<const float4*>(ring_ + read_ * device::kGemvTileRows + 4 * quad);
    scale[0] = v.x;
    scale[1] = v.y;
    scale[2] = v.z;
    scale[3] = v.w;
    read_ = (read_ + 1) % kGemvScaleTiles;
    __syncwarp();
  }

 private:
  __device__ __forceinline__ void Copy() {
    if (tile_ < num_tiles_ && lane_ < device::kGemvTileRows) {
      const int row = device::GemvRow(p_, tile_, lane_);
      CopyAsync4(ptx::SharedAddress(ring_ + write_ * device::kGemvTileRows + lane_),
                 p_.w_scale + max(row, 0), row >= 0);
    }
    CommitCopies();
    tile_ += step_;
    write_ = (write_ + 1) % kGemvScaleTiles;
  }

  const GemvParams& p_;
  const int step_, num_tiles_, lane_;
  float* const ring_;
  int tile_, write_ = 0, read_ = 0;
};

// Adds up the warps' sums of a tile, then the slices', and stores. Thread `e` of two warps has
// four rows of w (quad e % 4) for row e / 4 of x.
template <int kTiles>
__device__ __forceinline__ void FinishTiles(const GemvArgs& a, const GemvShare& share,
                                            const float* warp_sums, float* scale_rings,
                                            float4* inbox, GemvBarriers* barriers, int e) {
  const int m = e / 4, quad = e % 4;
  const bool mine = m < a.p.m;  // then m < 8 * kTiles
  ScaleCopies scales(a.p, share.first_tile, share.tile_step, a.num_tiles, e % 32,
                     scale_rings + e / 32 * kGemvScaleTiles * device::kGemvTileRows);
  if (a.cluster * a.sharers > 1) ClusterWaitAll();
  ptx::WaitForPredecessors();
  device::GemvQuad next{};
  if (mine && share.rank == 0) device::LoadOld(a.p, share.first_tile, m, quad, &next);
  int i = 0, filled = 0;
  for (int tile = share.first_tile; tile < a.num_tiles; tile += share.tile_step, ++i) {
    device::GemvQuad extra = next;
    const int after = tile + share.tile_step;
    if (mine && after < a.num_tiles && (i + 1) % a.cluster == share.rank) {
      device::LoadOld(a.p, after, m, quad, &next);
    }
    scales.Next(quad, extra.scale);
    float y[4] = {};
    for (int v = 0; v < share.num_slices; ++v, ++filled) {
      constexpr int kBuffers = kGemvSumBuffers<kTiles>;
      const int buffer = filled % kBuffers;
      ptx::BarrierWait(&barriers->sums_full[buffer], filled / kBuffers & 1);
      float slice[4] = {};
      if (mine) {
        const float* from =
            warp_sums + buffer * kGemvBufferFloats<kTiles> + m * kGemvSumStride + 4 * quad;
#pragma unroll
        for (int w = 0; w < kGemvMathWarps; ++w) {
          Add4(slice, *reinterpret_cast<const float4*>(from + w * 8 * kTiles * kGemvSumStride));
        }
      }
      __syncwarp();
      if (ptx::ArrivesForWarp(e % 32)) ptx::BarrierArrive(&barriers->sums_empty[buffer]);
      Add4(y, make_float4(slice[0], slice[1], slice[2], slice[3]));
    }
    if (a.cluster > 1 && !GatherSums(a, share.rank, i, inbox, barriers, e, y)) continue;
    device::FinishGemvQuad(a.p, tile, m, quad, extra, y, mine);
  }
}
#endif  // WINNOW_SM90A

// Dynamic shared memory: the ring | x | the warps' sums | factors of ToHalf() | the inbox.
template <int kTiles, int kDepth>
__global__ void __launch_bounds__(kGemvThreads, 1)
    GemvSm90Kernel(const __grid_constant__ GemvArgs args) {
#if WINNOW_SM90A
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ GemvBarriers barriers;
  __shared__ __align__(16) float scale_rings[2 * kGemvScaleTiles * device::kGemvTileRows];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  asm volatile("griddepcontrol.launch_dependents;");
  if (warp == 0) {
    if (lane < kMaxGemvK / kGemvXPiece) ptx::BarrierInit(&barriers.x_full[lane], 1);
    if (lane < 2 * kGemvMaxSlices) ptx::BarrierInit(&barriers.inbox_free[lane / 2][lane % 2], 1);
    if (lane < 2) {
      ptx::BarrierInit(&barriers.inbox_full[lane], 1);
      ptx::BarrierInit(&barriers.sums_full[lane], kGemvMathWarps * ptx::kWarpArrivals);
      ptx::BarrierInit(&barriers.sums_empty[lane], 2 * ptx::kWarpArrivals);
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  // No block's memory is written before its barriers are ready: each role waits for that.
  if (args.cluster * args.sharers > 1) ClusterArrive();
  const GemvShare share = ShareOf(args);
  uint8_t* x = ring + kDepth * kGemvStage;
  auto* sums = reinterpret_cast<float*>(x + args.p.m * args.x_stride);
  auto* inverse = reinterpret_cast<float(*)[kMaxGemvRows]>(sums + kGemvSumFloats<kTiles>);
  auto* inbox = reinterpret_cast<float4*>(inverse + GemvFactorRows(share.num_slices));
  if (warp < kGemvMathWarps) {
    Multiply<kTiles, kDepth>(args, share, ring, x, sums, inverse, &barriers, warp, lane);
  } else if (warp == kGemvMathWarps) {
    if (args.cluster * args.sharers > 1) ClusterWaitAll();
    LoadX(args, share, x, &barriers, lane);
  } else {
    FinishTiles<kTiles>(args, share, sums, scale_rings, inbox, &barriers,
                        (warp - kGemvMathWarps - 1) * 32 + lane);
  }
  // Nor after it has ended. x has come, since the products have been done.
  __syncwarp();
  if (args.cluster > 1) {
    ClusterArrive();
    ClusterWaitAll();
  }
#endif
}

template <int kTiles, int kDepth>
absl::Status EnqueueGemvKernel(const GemvArgs& args, int shared_bytes, StreamHandle stream) {
  static std::atomic<int> known[kGemvDevices][kGemvMaxSlices + 1];
  int device = 0;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device)));
  const int blocks = args.cluster * args.sharers;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(blocks);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kGemvThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = blocks > 1 ? 2 : 1;
  const auto kernel = GemvSm90Kernel<kTiles, kDepth>;
  WINNOW_ASSIGN_OR_RETURN(const int clusters,
                          GemvClusters(kernel, config, blocks, device,
                                       device < kGemvDevices ? &known[device][blocks] : nullptr));
  // Blocks that share x share no tile.
  const int most = (args.num_tiles + args.sharers - 1) / args.sharers;
  config.gridDim.x = static_cast<unsigned>(std::min(clusters, most) * blocks);
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, args));
}

template <int kTiles>
absl::Status EnqueueGemvSm90(const GemvParams& p, StreamHandle stream) {
  constexpr int kMost = kGemvSlice / kGemvChunk;  // chunks of a slice
  GemvArgs args{.p = p};
  const bool paired = p.epilogue == GemvEpilogue::kSiluMul;
  args.num_tiles = paired ? (p.n / 2 + 7) / 8 : (p.n + 15) / 16;
  args.num_chunks = (p.k + kGemvChunk - 1) / kGemvChunk;
  args.num_slices = (args.num_chunks + kMost - 1) / kMost;
  for (int i = 0; i <= args.num_slices; ++i) {
    args.slice_start[i] = static_cast<int16_t>(i * args.num_chunks / args.num_slices);
  }
  int fixed = 0;
  for (const int cluster : {1, args.num_slices}) {
    args.cluster = cluster;
    const int chunks = (args.num_chunks + cluster - 1) / cluster;
    args.x_stride = 2 * chunks * kGemvChunk + 16;
    fixed = p.m * args.x_stride + 4 * kGemvSumFloats<kTiles> +
            64 * GemvFactorRows(args.num_slices / cluster) + GemvInboxBytes(cluster);
    if (fixed + 5 * kGemvStage <= kGemvSharedBytes) break;
  }
  // A cluster waits for the slowest of its SMs to be free, so only a large x is worth it.
  const bool share_x = args.num_slices == 1 && p.m * args.x_stride >= kGemvShareBytes;
  args.sharers = share_x ? kGemvSharers : 1;
  // A longer ring only makes what comes behind it wait, and a short product for x.
  const bool shortest = kTiles == 1 && int64_t{p.n} * p.k <= int64_t{40} << 20;
  const auto fits = [&](int stages) { return fixed + stages * kGemvStage <= kGemvSharedBytes; };
  if (!shortest && fits(8)) {
    return EnqueueGemvKernel<kTiles, 8>(args, fixed + 8 * kGemvStage, stream);
  }
  if (!shortest && fits(5)) {
    return EnqueueGemvKernel<kTiles, 5>(args, fixed + 5 * kGemvStage, stream);
  }
  return EnqueueGemvKernel<kTiles, 4>(args, fixed + 4 * kGemvStage, stream);
}

}  // namespace winnow::kernels::internal
