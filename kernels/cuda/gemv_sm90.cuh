#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/gemv_copies.cuh"
#include "kernels/cuda/gemv_device.cuh"
#include "kernels/cuda/gemv_sm90.h"
#include "kernels/cuda/mma_sync.cuh"

// A block an SM. Eight warps take an eighth of each kilobyte of a tile's rows, each through a ring
// of its own that needs no barrier between warps. One warp copies x, two add the warps' sums up
// and store. k is summed in at most eight slices of kGemvSlice. Where x fits in shared memory, a
// block does all of them; else each is a block of a cluster, which keeps its part of x, and the
// blocks' sums meet in the memory of one of them. The sum's order is the same either way.
namespace winnow::kernels::internal {

#if WINNOW_SM90A

// A warp's part of a slice of x to float16, in place: rows times a power of two that brings
// their largest in the part to [2^14, 2^15), so that BF16 values are exact down to 2^-28 of it and
// off by 2^-39 of it below. `inverse` [16]: by what the sums must be multiplied.
__device__ __forceinline__ void ToHalf(const GemvArgs& a, uint8_t* x, int first_k, int num_chunks,
                                       int warp, int lane, float* inverse) {
  constexpr int kMost = kGemvSlice / kGemvChunk;
  for (int m = lane / 16; m < (a.p.m + 1) / 2 * 2; m += 2) {
    uint4* at[kMost];
    uint4 v[kMost];
    bool inside[kMost];
    uint32_t top = 0;
#pragma unroll
    for (int c = 0; c < kMost; ++c) {
      const int k = c * kGemvChunk + warp * kGemvWarpBytes + 8 * (lane % 16);
      at[c] = reinterpret_cast<uint4*>(x + m * a.x_stride + 2 * k);
      inside[c] = m < a.p.m && c < num_chunks && first_k + k < a.p.k;
      v[c] = inside[c] ? *at[c] : uint4{};
#pragma unroll
      for (const uint32_t w : {v[c].x, v[c].y, v[c].z, v[c].w}) {
        top = __vmaxu2(top, w & 0x7fff7fffu);
      }
    }
    top = max(top >> 16, top & 0xffffu);
#pragma unroll
    for (int step = 1; step < 16; step *= 2) {
      top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
    }
    const int shift = min(141 - static_cast<int>(top >> 7), 126);
    const float scale = __int_as_float((127 + shift) << 23);
    if (lane % 16 == 0 && m < a.p.m) inverse[m] = __int_as_float((127 - shift) << 23);
#pragma unroll
    for (int c = 0; c < kMost; ++c) {
      uint32_t words[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
      for (uint32_t& w : words) {
        const float low = __uint_as_float(w << 16), high = __uint_as_float(w & 0xffff0000u);
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high * scale), "f"(low * scale));
      }
      if (inside[c]) *at[c] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  __syncwarp();
}

// Adds 16 rows of w, 64 bytes of each (32 BF16 or 64 e4m3), times x to `sums`. A lane has 16
// bytes of rows lane / 4 and lane / 4 + 8, and of x the same k: which k a lane's registers hold
// may be permuted as long as both operands agree.
template <bool kE4m3, int kTiles>
__device__ __forceinline__ void MultiplyStep(float (&sums)[kTiles][4], const uint4& lo,
                                             const uint4& hi, const uint8_t* const (&x)[kTiles],
                                             int at, bool inside) {
  if constexpr (kE4m3) {
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
  } else {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint4 b = LoadShared(x[n] + at, inside);
      device::MmaBf16(sums[n], make_uint4(lo.x, hi.x, lo.y, hi.y), b.x, b.y);
      device::MmaBf16(sums[n], make_uint4(lo.z, hi.z, lo.w, hi.w), b.z, b.w);
    }
  }
}

template <bool kE4m3>
__device__ __forceinline__ void PrepareX(const GemvArgs& a, const GemvShare& share, uint8_t* x,
                                         float (*inverse)[kMaxGemvRows], GemvBarriers* barriers,
                                         int warp, int lane) {
  constexpr int kElements = kGemvElements<kE4m3>;
  const int size = min(share.num_chunks * kElements, a.p.k - share.first_chunk * kElements);
  for (int i = 0; i * kGemvXPiece < size; ++i) ptx::BarrierWait(&barriers->x_full[i], 0);
  if constexpr (kE4m3) {
    for (int v = 0; v < share.num_slices; ++v) {
      const int chunk = SliceStart(a, share.first_slice + v);
      ToHalf(a, x + 2 * (chunk - share.first_chunk) * kElements, chunk * kElements,
             SliceStart(a, share.first_slice + v + 1) - chunk, warp, lane,
             inverse[v * kGemvMathWarps + warp]);
    }
  }
}

template <bool kE4m3, int kTiles, int kDepth>
__device__ __forceinline__ void Multiply(const GemvArgs& a, const GemvShare& share,
                                         const uint8_t* ring, uint8_t* x, float* sums_out,
                                         float (*inverse)[kMaxGemvRows], GemvBarriers* barriers,
                                         int warp, int lane) {
  constexpr int kXBytes = kE4m3 ? 2 : 1;  // of x for a byte of w
  constexpr int kWarpStage = kGemvStage / kGemvMathWarps;
  const int g = lane / 4, t = lane % 4;
  const int start = warp * kGemvWarpBytes + 16 * t;
  const int row_bytes = a.p.k * (kE4m3 ? 1 : 2) - share.first_chunk * kGemvChunk;
  const uint8_t* mine = ring + warp * kDepth * kWarpStage;
  WeightCopies<kE4m3> copies(a, share, warp, lane);
#pragma unroll
  for (int i = 0; i < kDepth - 1; ++i) copies.Next(ptx::SharedAddress(mine + i * kWarpStage));
  PrepareX<kE4m3>(a, share, x, inverse, barriers, warp, lane);
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
      const int end = SliceStart(a, share.first_slice + v + 1) - share.first_chunk;
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
          MultiplyStep<kE4m3, kTiles>(sums, lo[step], hi[step], x_row, kXBytes * at,
                                      start + at < row_bytes);
        }
      }
      const int half = i & 1;
      ptx::BarrierWait(&barriers->sums_empty[half], ((i >> 1) & 1) ^ 1);
      float* out = sums_out + (half * kGemvMathWarps + warp) * 8 * kTiles * kGemvSumStride;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float even = 1.0f, odd = 1.0f;
        if constexpr (kE4m3) {
          const float* factors = inverse[v * kGemvMathWarps + warp] + 8 * n + 2 * t;
          even = factors[0];
          odd = factors[1];
        }
        float* to = out + (8 * n + 2 * t) * kGemvSumStride + g;
        to[0] = sums[n][0] * even;
        to[kGemvSumStride] = sums[n][1] * odd;
        to[8] = sums[n][2] * even;
        to[kGemvSumStride + 8] = sums[n][3] * odd;
      }
      __syncwarp();
      if (lane == 0) ptx::BarrierArrive(&barriers->sums_full[half]);
    }
  }
}

__device__ __forceinline__ void Add4(float (&sum)[4], const float4& v) {
  sum[0] += v.x;
  sum[1] += v.y;
  sum[2] += v.z;
  sum[3] += v.w;
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

// Adds up the warps' sums of a tile, then the slices', and stores. Thread `e` of two warps has
// four rows of w (quad e % 4) for row e / 4 of x.
template <int kTiles>
__device__ __forceinline__ void FinishTiles(const GemvArgs& a, const GemvShare& share,
                                            const float* warp_sums, float4* inbox,
                                            GemvBarriers* barriers, int e) {
  const int m = e / 4, quad = e % 4;
  const bool mine = m < a.p.m;  // then m < 8 * kTiles
  ptx::WaitForPredecessors();
  int i = 0, filled = 0;
  for (int tile = share.first_tile; tile < a.num_tiles; tile += share.tile_step, ++i) {
    device::GemvQuad extra{};
    if (i % a.cluster == share.rank && mine) extra = device::LoadGemvQuad(a.p, tile, m, quad);
    float y[4] = {};
    for (int v = 0; v < share.num_slices; ++v, ++filled) {
      const int half = filled & 1;
      ptx::BarrierWait(&barriers->sums_full[half], (filled >> 1) & 1);
      float slice[4] = {};
      if (mine) {
        const float* from = warp_sums + half * kGemvMathWarps * 8 * kTiles * kGemvSumStride +
                            m * kGemvSumStride + 4 * quad;
#pragma unroll
        for (int w = 0; w < kGemvMathWarps; ++w) {
          Add4(slice, *reinterpret_cast<const float4*>(from + w * 8 * kTiles * kGemvSumStride));
        }
      }
      __syncwarp();
      if (e % 32 == 0) ptx::BarrierArrive(&barriers->sums_empty[half]);
      Add4(y, make_float4(slice[0], slice[1], slice[2], slice[3]));
    }
    if (a.cluster > 1 && !GatherSums(a, share.rank, i, inbox, barriers, e, y)) continue;
    device::FinishGemvQuad(a.p, tile, m, quad, extra, y, mine);
  }
}
#endif  // WINNOW_SM90A

// Dynamic shared memory: the ring | x | the warps' sums | the inbox.
template <bool kE4m3, int kTiles, int kDepth>
__global__ void __launch_bounds__(kGemvThreads, 1)
    GemvSm90Kernel(const __grid_constant__ GemvArgs args) {
#if WINNOW_SM90A
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ GemvBarriers barriers;
  __shared__ float inverse[kE4m3 ? kGemvMaxSlices * kGemvMathWarps : 1][kMaxGemvRows];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  asm volatile("griddepcontrol.launch_dependents;");
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : barriers.x_full) ptx::BarrierInit(&barrier, 1);
    for (int i = 0; i < 2; ++i) {
      ptx::BarrierInit(&barriers.sums_full[i], kGemvMathWarps);
      ptx::BarrierInit(&barriers.sums_empty[i], 2);
      ptx::BarrierInit(&barriers.inbox_full[i], 1);
      for (auto& block : barriers.inbox_free) ptx::BarrierInit(&block[i], 1);
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  // No block's memory is written before its barriers are ready, nor after it has ended.
  if (args.cluster > 1) ClusterSync();
  const GemvShare share = ShareOf(args);
  uint8_t* x = ring + kDepth * kGemvStage;
  auto* sums = reinterpret_cast<float*>(x + args.p.m * args.x_stride);
  auto* inbox = reinterpret_cast<float4*>(reinterpret_cast<uint8_t*>(sums) + kGemvSumBytes<kTiles>);
  if (warp < kGemvMathWarps) {
    Multiply<kE4m3, kTiles, kDepth>(args, share, ring, x, sums, inverse, &barriers, warp, lane);
  } else if (warp == kGemvMathWarps) {
    LoadX<kE4m3>(args, share, x, &barriers, lane);
  } else {
    FinishTiles<kTiles>(args, share, sums, inbox, &barriers,
                        (warp - kGemvMathWarps - 1) * 32 + lane);
  }
  __syncwarp();
  if (args.cluster > 1) ClusterSync();
#endif
}

// As many clusters of `blocks` blocks as the device runs at once, an SM a block.
template <typename Kernel>
absl::StatusOr<int> GemvClusters(Kernel* kernel, const cudaLaunchConfig_t& config, int blocks,
                                 std::atomic<int>* known) {
  int clusters = known->load(std::memory_order_relaxed);
  if (clusters > 0) return clusters;
  WINNOW_RETURN_IF_ERROR(CudaStatus(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kGemvSharedBytes)));
  if (blocks == 1) {
    int device = 0;
    WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device)));
    WINNOW_RETURN_IF_ERROR(
        CudaStatus(cudaDeviceGetAttribute(&clusters, cudaDevAttrMultiProcessorCount, device)));
  } else {
    // As if it took a whole SM's memory.
    cudaLaunchConfig_t alone = config;
    alone.dynamicSmemBytes = kGemvSharedBytes;
    WINNOW_RETURN_IF_ERROR(CudaStatus(cudaOccupancyMaxActiveClusters(&clusters, kernel, &alone)));
  }
  if (clusters < 1) {
    return absl::InternalError(absl::StrCat("gemv: no cluster of ", blocks, " blocks fits"));
  }
  known->store(clusters, std::memory_order_relaxed);
  return clusters;
}

template <bool kE4m3, int kTiles, int kDepth>
absl::Status EnqueueGemvKernel(const GemvArgs& args, int shared_bytes, StreamHandle stream) {
  static std::atomic<int> known[kGemvMaxSlices + 1];
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(args.cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(args.cluster));
  config.blockDim = dim3(kGemvThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = args.cluster > 1 ? 2 : 1;
  const auto kernel = GemvSm90Kernel<kE4m3, kTiles, kDepth>;
  WINNOW_ASSIGN_OR_RETURN(const int clusters,
                          GemvClusters(kernel, config, args.cluster, &known[args.cluster]));
  config.gridDim.x = static_cast<unsigned>(std::min(clusters, args.num_tiles) * args.cluster);
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, args));
}

template <bool kE4m3, int kTiles>
absl::Status EnqueueGemvSm90(const GemvParams& p, StreamHandle stream) {
  constexpr int kElements = kGemvElements<kE4m3>;
  constexpr int kMost = kGemvSlice / kElements;  // chunks of a slice
  GemvArgs args{.p = p};
  const bool paired = p.epilogue == GemvEpilogue::kSiluMul;
  args.num_tiles = paired ? (p.n / 2 + 7) / 8 : (p.n + 15) / 16;
  args.num_chunks = (p.k + kElements - 1) / kElements;
  args.num_slices = (args.num_chunks + kMost - 1) / kMost;
  int fixed = 0;
  for (const int cluster : {1, args.num_slices}) {
    args.cluster = cluster;
    const int chunks = (args.num_chunks + cluster - 1) / cluster;
    args.x_stride = 2 * chunks * kElements + (kE4m3 ? 16 : 64);
    fixed = p.m * args.x_stride + kGemvSumBytes<kTiles> + GemvInboxBytes(cluster);
    if (fixed + 4 * kGemvStage <= kGemvSharedBytes) break;
  }
  if (fixed + 8 * kGemvStage <= kGemvSharedBytes) {
    return EnqueueGemvKernel<kE4m3, kTiles, 8>(args, fixed + 8 * kGemvStage, stream);
  }
  if (fixed + 6 * kGemvStage <= kGemvSharedBytes) {
    return EnqueueGemvKernel<kE4m3, kTiles, 6>(args, fixed + 6 * kGemvStage, stream);
  }
  return EnqueueGemvKernel<kE4m3, kTiles, 4>(args, fixed + 4 * kGemvStage, stream);
}

}  // namespace winnow::kernels::internal
