#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/ptx.cuh"
#include "kernels/kv_format.h"

// How pages of the cache lie in shared memory and get there: by the copy engine on sm_90a, by
// 16-byte cp.async of a whole warp elsewhere. Barriers are mbarriers either way.
namespace winnow::kernels::device {

template <KvElement kK, KvElement kV, int kDim>
struct DecodeShape {
  static constexpr int kBytes = static_cast<int>(KvElementBytes(kK));
  static_assert(KvElementBytes(kK) == KvElementBytes(kV));
  static constexpr bool kScaled = kBytes == 1;
  static constexpr int kPageBytes = static_cast<int>(PageBytes(kDim));
  static constexpr int kRowBytes = kDim * kBytes;
  static constexpr int kSlots = kPageBytes / (2 * kRowBytes + (kScaled ? 4 : 0));
  static constexpr int kTiles = kSlots / 16;  // of 16 keys
  static_assert(kSlots % 16 == 0);
  static constexpr int kPartBytes = kSlots * kRowBytes;  // K of a page, or V
  static constexpr int kCodeBytes = 2 * kPartBytes;
  static_assert(kPartBytes % 1024 == 0);
  static constexpr int kScaleBytes = kScaled ? 4 * kSlots : 0;
  static constexpr int kPageRows = kPageBytes / 128;  // of 128 bytes
  static_assert(kPageBytes % 128 == 0);
};

// Codes lie in rows of 128 bytes, whose 16-byte vectors are permuted by the row's number as
// the copy engine's 128-byte swizzle does. Linear: of a ^ b it is that of a ^ that of b.
constexpr int Swizzled(int offset) { return offset ^ ((offset >> 3) & 0x70); }

// Arrivals that a page's barrier waits for before the bytes do.
#if WINNOW_SM90A
inline constexpr uint32_t kFillArrivals = 1;
#else
inline constexpr uint32_t kFillArrivals = 32;
#endif

__device__ __forceinline__ void RingBarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(ptx::SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void RingArrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(
                   ptx::SharedAddress(barrier))
               : "memory");
}

// Waits until the phase of parity `parity` has completed.
__device__ __forceinline__ void RingWait(uint64_t* barrier, uint32_t parity) {
#if WINNOW_SM90A
  ptx::BarrierWait(barrier, parity);
#else
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(ptx::SharedAddress(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

// The copies below are enqueued by all lanes of a warp between RingFillBegin() and
// RingFillEnd(); what they bring completes on `full`.
__device__ __forceinline__ void RingFillBegin(uint64_t* full, uint32_t bytes, int lane) {
#if WINNOW_SM90A
  if (lane == 0) ptx::BarrierArriveExpect(full, bytes);
  __syncwarp();
#endif
}
__device__ __forceinline__ void RingFillEnd(uint64_t* full) {
#if !WINNOW_SM90A
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(ptx::SharedAddress(full))
               : "memory");
#endif
}

// 16 aligned bytes by this lane.
__device__ __forceinline__ void RingCopy16(uint8_t* to, const uint8_t* from, uint64_t* full) {
#if WINNOW_SM90A
  ptx::LoadBulk(to, from, 16, full);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(ptx::SharedAddress(to)), "l"(from)
               : "memory");
#endif
}

// A page into `codes` (1024-byte aligned) and `scales`. `map` describes all pages' bytes as
// rows of 128, `page` is the page's id and `base` its address.
template <typename S>
__device__ __forceinline__ void RingFillPage(const CUtensorMap* map, int page, const uint8_t* base,
                                             uint8_t* codes, uint8_t* scales, uint64_t* full,
                                             int lane) {
#if WINNOW_SM90A
  if (lane == 0) {
    ptx::BarrierArriveExpect(full, S::kCodeBytes + S::kScaleBytes);
    ptx::LoadBox2(codes, map, full, 0, page * S::kPageRows);
    if constexpr (S::kScaled) {
      ptx::LoadBulk(scales, base + S::kCodeBytes, S::kScaleBytes, full);
    }
  }
#else
  for (int i = lane * 16; i < S::kCodeBytes; i += 512) {
    RingCopy16(codes + Swizzled(i), base + i, full);
  }
  if (lane * 16 < S::kScaleBytes) {
    RingCopy16(scales + lane * 16, base + S::kCodeBytes + lane * 16, full);
  }
  RingFillEnd(full);
#endif
}

// A flat row as the first token of a page; its two scales come first in `scales`.
template <typename S>
__device__ __forceinline__ void RingFillRow(const uint8_t* row, uint8_t* codes, uint8_t* scales,
                                            uint64_t* full, int lane) {
  constexpr int kVectors = S::kRowBytes / 16;
  RingFillBegin(full, 2 * S::kRowBytes + (S::kScaled ? 16 : 0), lane);
  for (int i = lane; i < 2 * kVectors + (S::kScaled ? 1 : 0); i += 32) {
    uint8_t* to = i < kVectors       ? codes + Swizzled(i * 16)
                  : i < 2 * kVectors ? codes + S::kPartBytes + Swizzled((i - kVectors) * 16)
                                     : scales;
    RingCopy16(to, row + i * 16, full);
  }
  RingFillEnd(full);
}

}  // namespace winnow::kernels::device
