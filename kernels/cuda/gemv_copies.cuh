#pragma once

#include <cstdint>

#include "kernels/cuda/gemv.h"
#include "kernels/cuda/ptx.cuh"

// How the weight-streaming kernels for sm_90a move data: copies into shared memory, and its layout
// for BF16 weights.
namespace winnow::kernels::internal {

inline constexpr int kGemvMathWarps = 8;
inline constexpr int kGemvSlice = 4096;                // elements
inline constexpr int kGemvChunk = 1024;                // bytes of a weight row
inline constexpr int kGemvWarpBytes = kGemvChunk / 8;  // of them, a warp's
inline constexpr int kGemvStage = 16 * kGemvChunk;     // all warps'
inline constexpr int kGemvSharedBytes = 225 * 1024;    // dynamic, at most

#if WINNOW_SM90A

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
