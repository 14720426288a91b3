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
  static constexpr int kUsedBytes = kCodeBytes + kScaleBytes;
  static constexpr int kPageRows = kPageBytes / 128;  // of 128 bytes
  static_assert(kPageBytes % 128 == 0 && kUsedBytes % 128 == 0 && kCodeBytes % 1024 == 0);
  // A page in shared memory: codes, then scales, where the next one may start.
  static constexpr int kRingBytes = (kUsedBytes + 1023) / 1024 * 1024;
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

#if WINNOW_SM90A
// Bytes that are read once leave the L2 cache first: createpolicy's, of a whole access.
inline constexpr uint64_t kEvictFirst = 0x12f0000000000000;

// True on one lane of a whole warp. The compiler knows that of elect.sync, and otherwise loops
// over the lanes around each instruction that takes uniform registers.
__device__ __forceinline__ bool ElectLane() {
  uint32_t elected;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}\n"
               : "=r"(elected));
  return elected != 0;
}
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

#if !WINNOW_SM90A
// 16 aligned bytes by this lane.
__device__ __forceinline__ void RingCopy16(uint8_t* to, const uint8_t* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(ptx::SharedAddress(to)), "l"(from)
               : "memory");
}
// Of all lanes: arrives when the lane's copies are there.
__device__ __forceinline__ void RingFillEnd(uint64_t* full) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(ptx::SharedAddress(full))
               : "memory");
}
#endif

// The copies below are enqueued by a whole warp; what they bring completes on `full`.

// A page to `to` (1024-byte aligned). `map` describes all pages' bytes as rows of 128, of which
// a box is what S uses of a page; `page` is the page's id and `pages` the address of the first.
template <typename S>
__device__ __forceinline__ void RingFillPage(const CUtensorMap* map, int page, const uint8_t* pages,
                                             uint8_t* to, uint64_t* full, int lane) {
#if WINNOW_SM90A
  if (ElectLane()) {
    ptx::BarrierArriveExpect(full, S::kUsedBytes);
    ptx::LoadBox2Once(to, map, full, 0, page * S::kPageRows, kEvictFirst);
  }
#else
  const uint8_t* from = pages + static_cast<int64_t>(page) * S::kPageBytes;
  for (int i = lane * 16; i < S::kUsedBytes; i += 512) {
    RingCopy16(to + Swizzled(i), from + i);
  }
  RingFillEnd(full);
#endif
}

// A flat row as the first token of a page; its two scales come first among the page's.
template <typename S>
__device__ __forceinline__ void RingFillRow(const uint8_t* row, uint8_t* to, uint64_t* full,
                                            int lane) {
#if WINNOW_SM90A
  if (ElectLane()) {
    ptx::BarrierArriveExpect(full, 2 * S::kRowBytes + (S::kScaled ? 16 : 0));
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint8_t* from = row + part * S::kRowBytes;
      uint8_t* part_to = to + part * S::kPartBytes;
      ptx::LoadBulk(part_to, from, S::kRowBytes < 128 ? S::kRowBytes : 128, full);  // as it is
      for (int i = 128; i < S::kRowBytes; i += 16) {
        ptx::LoadBulk(part_to + Swizzled(i), from + i, 16, full);
      }
    }
    if constexpr (S::kScaled) ptx::LoadBulk(to + S::kCodeBytes, row + 2 * S::kRowBytes, 16, full);
  }
#else
  constexpr int kVectors = S::kRowBytes / 16;
  for (int i = lane; i < 2 * kVectors + (S::kScaled ? 1 : 0); i += 32) {
    const int at = i < kVectors       ? Swizzled(i * 16)
                   : i < 2 * kVectors ? S::kPartBytes + Swizzled((i - kVectors) * 16)
                                      : S::kCodeBytes;
    RingCopy16(to + at, row + i * 16);
  }
  RingFillEnd(full);
#endif
}

}  // namespace winnow::kernels::device
