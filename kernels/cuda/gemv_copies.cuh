#pragma once

#include <cstdint>

#include "kernels/cuda/gemv_device.cuh"
#include "kernels/cuda/ptx.cuh"

// What the weight-streaming kernel for sm_90a moves: the layout of its shared memory, copies of
// w and x into it, and messages between the blocks of a cluster.
namespace winnow::kernels::internal {

inline constexpr int kGemvMathWarps = 8;
inline constexpr int kGemvThreads = 32 * (kGemvMathWarps + 3);
inline constexpr int kGemvSlice = 4096;                // elements
inline constexpr int kGemvChunk = 1024;                // bytes of a weight row
inline constexpr int kGemvWarpBytes = kGemvChunk / 8;  // of them, a warp's
inline constexpr int kGemvSteps = kGemvWarpBytes / 64;
inline constexpr int kGemvStage = 16 * kGemvChunk;  // all warps'
inline constexpr int kGemvMaxSlices = kMaxGemvK / kGemvSlice;
inline constexpr int kGemvXPiece = 2048;   // elements of a row of x that are copied at once
inline constexpr int kGemvSumStride = 20;  // floats between rows of x in a warp's sums
inline constexpr int kGemvSharedBytes = 225 * 1024;              // dynamic, at most
inline constexpr int kGemvSharers = 2, kGemvShareBytes = 60000;  // see EnqueueGemvSm90()
inline constexpr int kGemvScaleTiles = 8;                        // whose scales are under way
// Tiles whose sums wait to be added up: a tile of eight rows takes less time than that.
template <int kTiles>
inline constexpr int kGemvSumBuffers = kTiles == 1 ? 2 : 1;
template <int kTiles>
inline constexpr int kGemvBufferFloats = kGemvMathWarps * 8 * kTiles* kGemvSumStride;
template <int kTiles>
inline constexpr int kGemvSumFloats = kGemvSumBuffers<kTiles>* kGemvBufferFloats<kTiles>;
__host__ __device__ constexpr int GemvFactorRows(int slices) {  // [16] floats each
  return slices * kGemvMathWarps;
}
constexpr int GemvInboxBytes(int blocks) {
  return blocks > 1 ? 2 * blocks * kMaxGemvRows * device::kGemvTileRows * 4 : 0;
}

struct GemvBarriers {
  uint64_t x_full[kMaxGemvK / kGemvXPiece];
  uint64_t sums_full[2], sums_empty[2];
  // Between a cluster's blocks: slot s of the inbox is full; block b's slot s may be filled.
  uint64_t inbox_full[2], inbox_free[kGemvMaxSlices][2];
};

struct GemvArgs {
  GemvParams p;
  int num_tiles = 0, num_chunks = 0, num_slices = 0;
  int cluster = 0;                               // blocks that share a tile: num_slices or 1
  int sharers = 0;                               // blocks that copy x together, where cluster is 1
  int x_stride = 0;                              // bytes between rows of x in shared memory
  int16_t slice_start[kGemvMaxSlices + 1] = {};  // in chunks
};

#if WINNOW_SM90A

// Zeros unless `inside`: past the end of k lies what nobody wrote.
__device__ __forceinline__ uint4 LoadShared(const uint8_t* p, bool inside) {
  return inside ? *reinterpret_cast<const uint4*>(p) : uint4{};
}

// Four matrices of 8 rows by 16 bytes: lane i has the address of row i % 8 of number i / 8, and
// gets of each, in order, bytes 4 (i % 4) to 4 (i % 4) + 3 of row i / 4.
__device__ __forceinline__ uint4 LoadMatrices(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint64_t ReadOncePolicy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void BulkLoad(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(ptx::SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(ptx::SharedAddress(barrier))
      : "memory");
}

// Copies 16 bytes, or zeros unless `inside`.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, bool inside,
                                          uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(from), "r"(inside ? 16 : 0), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CopyAsync4(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same into the memory of `blocks` blocks of the cluster, at the same place in each and
// completing on the same barrier of each.
__device__ __forceinline__ void BulkLoadAll(void* to, const void* from, int bytes,
                                            uint64_t* barrier, int blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(ptx::SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(ptx::SharedAddress(barrier)),
      "h"(static_cast<uint16_t>((1 << blocks) - 1))
      : "memory");
}

// Address of `p` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t AddressIn(const void* p, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(ptx::SharedAddress(p)), "r"(rank));
  return address;
}
// Stores into another block's memory; 16 bytes complete on that block's barrier.
__device__ __forceinline__ void StoreAsync(uint32_t to, const float (&v)[4], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4},"
      " [%5];" ::"r"(to),
      "r"(__float_as_uint(v[0])), "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
      "r"(__float_as_uint(v[3])), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void ArriveIn(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}
// ptx::BarrierWait() for what other blocks of the cluster did.
__device__ __forceinline__ void ClusterWait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\nbra again;\nready:\n}\n" ::"r"(ptx::SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWaitAll() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where a block stands: its slices and chunks of k and its tiles first, first + step, ...
struct GemvShare {
  int rank, first_tile, tile_step, first_slice, num_slices, first_chunk, num_chunks;
};
__device__ __forceinline__ int SliceStart(const GemvArgs& a, int slice) {
  return a.slice_start[slice];
}
__device__ __forceinline__ GemvShare ShareOf(const GemvArgs& a) {
  const int block = static_cast<int>(blockIdx.x), rank = block % a.cluster;
  const int num_slices = a.cluster == 1 ? a.num_slices : 1, first_chunk = SliceStart(a, rank);
  return {.rank = rank,
          .first_tile = block / a.cluster,
          .tile_step = static_cast<int>(gridDim.x) / a.cluster,
          .first_slice = rank,
          .num_slices = num_slices,
          .first_chunk = first_chunk,
          .num_chunks = SliceStart(a, rank + num_slices) - first_chunk};
}

// Where 16 bytes lie in a warp's stage, [16 rows][128 bytes]: so that neither eight lanes that copy
// a row nor eight that read half of two rows share a bank.
__device__ __forceinline__ int StageAt(int row, int column) {
  return 128 * row + 16 * (column ^ ((row & 1) << 2 | (row >> 1 & 3)));
}

// A warp's copies, running ahead of the products: a lane has 16 bytes of every fourth row.
class WeightCopies {
 public:
  __device__ __forceinline__ WeightCopies(const GemvArgs& a, const GemvShare& share, int warp,
                                          int lane)
      : a_(a),
        share_(share),
        row_(lane / 8),
        start_(share.first_chunk * kGemvChunk + warp * kGemvWarpBytes + 16 * (lane % 8)),
        row_bytes_(a.p.k),
        even_(StageAt(row_, lane % 8)),
        odd_(StageAt(row_ + 4, lane % 8)),
        tile_(share.first_tile),
        policy_(ReadOncePolicy()) {
    Locate();
  }

  // Enqueues a chunk, in a group of its own; an empty one past the last.
  __device__ __forceinline__ void Next(uint32_t to) {
    if (tile_ < a_.num_tiles) {
      const int at = start_ + chunk_ * kGemvChunk;
      const bool inside = at < row_bytes_;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* from = rows_[half] + at;
        CopyAsync(to + even_ + 1024 * half, from, inside && has_[2 * half], policy_);
        CopyAsync(to + odd_ + 1024 * half, from + 4 * row_bytes_, inside && has_[2 * half + 1],
                  policy_);
      }
      if (++chunk_ == share_.num_chunks) {
        chunk_ = 0;
        tile_ += share_.tile_step;
        Locate();
      }
    }
    CommitCopies();
  }

 private:
  __device__ __forceinline__ void Locate() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = device::GemvRow(a_.p, tile_, row_ + 4 * i);
      has_[i] = row >= 0;
      if (i % 2 == 0) {
        rows_[i / 2] = static_cast<const uint8_t*>(a_.p.w) + int64_t{max(row, 0)} * row_bytes_;
      }
    }
  }

  const GemvArgs& a_;
  const GemvShare& share_;
  const int row_, start_, row_bytes_, even_, odd_;
  int tile_, chunk_ = 0;
  bool has_[4];
  const uint8_t* rows_[2];
  const uint64_t policy_;
};

__device__ __forceinline__ void LoadX(const GemvArgs& a, const GemvShare& share, uint8_t* x,
                                      GemvBarriers* barriers, int lane) {
  const int first = share.first_chunk * kGemvChunk;
  const int size = min(share.num_chunks * kGemvChunk, a.p.k - first);
  ptx::WaitForPredecessors();
  __syncwarp();
  for (int at = 0, i = 0; at < size; at += kGemvXPiece, ++i) {
    const int bytes = 2 * min(kGemvXPiece, size - at);
    if (lane == 0) ptx::BarrierArriveExpect(&barriers->x_full[i], a.p.m * bytes);
    uint8_t* to = x + lane * a.x_stride + 2 * at;
    const Bf16* from = a.p.x + lane * a.p.ldx + first + at;
    if (lane >= a.p.m) continue;
    if (a.sharers == 1) {
      BulkLoad(to, from, bytes, &barriers->x_full[i]);
    } else if (lane % a.sharers == static_cast<int>(blockIdx.x) % a.sharers) {
      BulkLoadAll(to, from, bytes, &barriers->x_full[i], a.sharers);
    }
  }
}
__device__ __forceinline__ void Add4(float (&sum)[4], const float4& v) {
  sum[0] += v.x;
  sum[1] += v.y;
  sum[2] += v.z;
  sum[3] += v.w;
}
#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
