#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

// Thin wrappers of the PTX by which the blocks of a cluster talk to each other (sm_90a).
namespace winnow::kernels::ptx {

#if WINNOW_SM90A

// Of this block in its cluster, and of the cluster.
__device__ __forceinline__ int ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int ClusterSize() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// Address of `p` in the shared memory of block `rank`. Computed where it stands, not at its use.
__device__ __forceinline__ uint32_t AddressIn(const void* p, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(SharedAddress(p)), "r"(rank));
  return address;
}

// Store into another block's memory; the bytes complete on `barrier`, that block's.
__device__ __forceinline__ void StoreAsync(uint32_t to, const float4& v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4},"
      " [%5];" ::"r"(to),
      "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(__float_as_uint(v.z)),
      "r"(__float_as_uint(v.w)), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void StoreAsync(uint32_t to, const float2& v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::
          "r"(to),
      "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void StoreAsync(uint32_t to, float v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
      "r"(__float_as_uint(v)), "r"(barrier)
      : "memory");
}

// Arrives at another block's barrier.
__device__ __forceinline__ void ArriveIn(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}
// BarrierWait() for what other blocks did.
__device__ __forceinline__ void BarrierWaitCluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\nbra again;\nready:\n}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// All threads of the cluster arrive, and wait for all. The arrival that releases nothing is for
// barriers that were fenced after their initialization (FenceBarrierInit()).
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterArriveRelaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWaitAll() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::ptx
