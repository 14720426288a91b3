#pragma once

#include <cstdint>

#include "kernels/cuda/gemv.h"
#include "kernels/cuda/ptx.cuh"

// How the weight-streaming kernels for sm_90a move data: copies into shared memory, its layout for
// BF16 weights, and messages between the blocks of a cluster.
namespace winnow::kernels::internal {

inline constexpr int kGemvMathWarps = 8;
inline constexpr int kGemvSlice = 4096;                // elements
inline constexpr int kGemvChunk = 1024;                // bytes of a weight row
inline constexpr int kGemvWarpBytes = kGemvChunk / 8;  // of them, a warp's
inline constexpr int kGemvStage = 16 * kGemvChunk;     // all warps'
inline constexpr int kGemvSharedBytes = 225 * 1024;    // dynamic, at most

#if WINNOW_SM90A

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
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
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

// Where 16 bytes lie in a warp's stage, [16 rows][128 bytes]: so that neither eight lanes that copy
// a row nor eight that read half of two rows share a bank.
__device__ __forceinline__ int StageAt(int row, int column) {
  return 128 * row + 16 * (column ^ ((row & 1) << 2 | (row >> 1 & 3)));
}

__device__ __forceinline__ void Add4(float (&sum)[4], const float4& v) {
  sum[0] += v.x;
  sum[1] += v.y;
  sum[2] += v.z;
  sum[3] += v.w;
}
#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
