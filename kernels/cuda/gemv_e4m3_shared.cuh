#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/gemv.h"
#include "kernels/cuda/gemv_copies.cuh"
#include "kernels/cuda/ptx_cluster.cuh"

// What the parts of the kernel for e4m3 weights on sm_90a share: shapes, shared memory, PTX.
//
// k is cut into kE4m3Parts parts of so many chunks of 128; a unit adds up 1, 2 or 4 parts that
// follow each other. A tile is kRows rows of w. The 64 rows of wgmma's A are those of kSlices
// units, and B's columns hold x of the same units, so that each row of A has some columns of use:
// x fills no more memory than it must, 2 bytes for each k and row. The sum of an output is that of
// its parts in a binary tree, whatever the shape.
namespace winnow::kernels::internal {

inline constexpr int kE4m3Chunk = 128;  // k whose products are summed in the tensor core
inline constexpr int kE4m3Parts = 8;
inline constexpr int kE4m3Groups = 2;  // warpgroups that multiply, each units of its own
inline constexpr int kE4m3MathWarps = 4 * kE4m3Groups;
inline constexpr int kE4m3GroupChunk = 64 * kE4m3Chunk;
inline constexpr int kE4m3ChunkBytes = kE4m3Groups * kE4m3GroupChunk;
inline constexpr int kE4m3MaxStages = 14, kE4m3MaxSlots = 32;
inline constexpr int kE4m3MinSlots = 4;  // unless there are all

// Of a block that multiplies by kM_ rows of x.
template <int kM_, int kSlices_>
struct E4m3Shape {
  static constexpr int kM = kM_, kSlices = kSlices_;
  static constexpr int kRows = 64 / kSlices;            // of a tile
  static constexpr int kColumns = 2 * kM * kSlices;     // of B
  static constexpr int kUnits = kE4m3Groups * kSlices;  // of a block
  static constexpr int kPasses = kE4m3Parts / kUnits;   // parts of a unit, one block a tile
  static constexpr int kPairs = kUnits * kM;            // of columns: rows of x by units
  static constexpr int kXBytes = 256 * kPairs;          // of a chunk
  static constexpr int kSumStride = kRows + 8;
  static constexpr int kSums = kUnits * kM * kSumStride;  // floats
  static constexpr int kOutputs = kRows * kM;
  static constexpr int kXWarps = kM <= 4 ? 4 : kM <= 8 ? 8 : 16;  // that prepare x and finish tiles
  static constexpr int kXThreads = 32 * kXWarps;
  static constexpr int kThreads = 32 * (kE4m3MathWarps + 2) + kXThreads;  // two that copy
  static constexpr int kBlocks = kM <= 4 ? 2 : 1;  // an SM: this kernel's and the next one's
};

struct E4m3Barriers {
  uint64_t full[kE4m3MaxStages], empty[kE4m3MaxStages];
  uint64_t x_raw[kE4m3MaxSlots], x_full[kE4m3MaxSlots], x_empty[kE4m3MaxSlots];
  uint64_t sums_full[2], sums_empty[2];
  // Between the two blocks of a cluster: slot s of the inbox is full; the other's may be filled.
  uint64_t inbox_full[2], inbox_free[2];
};

struct E4m3Args {
  GemvParams p;
  int num_tiles = 0;
  int cluster = 0;           // blocks that share a tile, 1 or 2, each half the parts
  int passes = 0;            // parts of a unit
  int chunks = 0;            // of a part, a multiple of kWide
  int stages = 0;            // of the ring, kWide chunks each
  int slots = 0;             // of x, kWide chunks each
  bool whole_parts = false;  // k is parts of `chunks`: the map is of four dimensions
};

template <typename S, int kWide>
constexpr int E4m3SharedBytes(int stages, int slots) {
  return kWide * (stages * kE4m3ChunkBytes + slots * (S::kXBytes + 4 * S::kPairs)) +
         4 * (2 * S::kSums + 2 * S::kOutputs) + static_cast<int>(sizeof(E4m3Barriers));
}

#if WINNOW_SM90A

template <typename S, int kWide>
struct E4m3Block {
  static constexpr int kStage = kWide * kE4m3ChunkBytes, kSlot = kWide * S::kXBytes;

  const E4m3Args& a;
  uint8_t* ring;   // [stages][kWide][kE4m3Groups][64][128], swizzled
  uint8_t* x;      // [slots][kWide][kE4m3Groups][kColumns][128], swizzled
  float* sums;     // [2][kUnits][kM][kSumStride]
  float* inbox;    // [2][kM][kRows]
  float* factors;  // [slots][kWide][kPairs]
  E4m3Barriers* barriers;
  int rank, first_tile, tile_step;
  int pass_steps, steps;  // stages of a part and of a tile
  bool held;              // there is a slot for each: x is prepared once

  __device__ __forceinline__ int Tiles() const {
    return first_tile < a.num_tiles ? (a.num_tiles - 1 - first_tile) / tile_step + 1 : 0;
  }
  __device__ __forceinline__ int FirstK(int unit) const {
    return (rank * S::kUnits + unit) * steps * (kWide * kE4m3Chunk);
  }
};

// d[64, kN] (+)= a[64, 32] * b[kN, 32]^T of e4m3, both from shared memory, both K-major.
__device__ __forceinline__ void WgmmaE4m3Ss(float (&d)[4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, p, 1, 1;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b), "r"(add));
}
#define WINNOW_F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
__device__ __forceinline__ void WgmmaE4m3Ss(float (&d)[8], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, "
      "%9, p, 1, 1;\n}\n"
      : WINNOW_F4(d, 0), WINNOW_F4(d, 4)
      : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void WgmmaE4m3Ss(float (&d)[16], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1;\n}\n"
      : WINNOW_F4(d, 0), WINNOW_F4(d, 4), WINNOW_F4(d, 8), WINNOW_F4(d, 12)
      : "l"(a), "l"(b), "r"(add));
}
#undef WINNOW_F4

// A branch where wgmma is under way makes the compiler wait for each.
__device__ __forceinline__ void StoreSharedIf(bool store, const float* to, float v) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.shared.f32 [%0], %1;\n}\n" ::"r"(
                   ptx::SharedAddress(to)),
               "f"(v), "r"(static_cast<int>(store))
               : "memory");
}
#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
