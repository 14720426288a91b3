#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/dms_prefill_plan.cuh"
#include "kernels/cuda/dms_prefill_sm90.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor_map.h"

// Prefix + band on Hopper. A block is one producer warpgroup (one thread issues copies)
// and kConsumers warpgroups of 64 query rows; blocks stay and take tiles by ticket,
// longest first. A row of a tile is (position, head of the group), so all heads of a
// group share the keys. The keys of a tile are one list, in boxes of kBoxKeys:
//
//   survivors older than the window of every row [0, n) | padding to a multiple of 8 |
//   the band, dense [padded, padded + band)
//
// Boxes wholly in the survivors, or in the middle of the band, need no mask.
//
// Shared memory: queries [dim/64][rows][64], then kStages of K and V boxes
// [dim/64][kBoxKeys][64], all in 128-byte swizzled rows, then barriers and tiles.
namespace winnow::kernels::internal {

template <int kDim_>
struct PrefillShape {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kTileRows<kDim>;
  static constexpr int kConsumers = kRows / 64;
  static constexpr int kBoxKeys = 128;
  static constexpr int kStages = kDim == 64 ? 4 : 2;
  static constexpr int kHalves = kDim / 64;  // 64-column pieces of a row
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr uint32_t kQueryBytes = kRows * kDim * 2;
  static constexpr uint32_t kBoxBytes = kBoxKeys * kDim * 2;
};

// A tile as the block's threads need it; head < 0: no more tiles.
struct TileWork {
  int32_t head;
  int32_t num_survivors, padded, num_keys;  // ends of the list's three parts
  int32_t compact_row;                      // of the first survivor
  int32_t band_row;                         // of the first band key
  int32_t query_offset;                     // of the first position, from the first band key
  int32_t row;                              // of the first position in q and out
  int32_t num_positions;
};

template <typename Shape>
struct PrefillShared {
  alignas(1024) uint8_t q[Shape::kQueryBytes];
  alignas(1024) uint8_t k[Shape::kStages][Shape::kBoxBytes];
  alignas(1024) uint8_t v[Shape::kStages][Shape::kBoxBytes];
  alignas(8) uint64_t q_full, q_empty;
  uint64_t k_full[Shape::kStages], k_empty[Shape::kStages];
  uint64_t v_full[Shape::kStages], v_empty[Shape::kStages];
  uint64_t work_full[2], work_empty[2];
  TileWork work[2];
};

// Boxes of 128, 32 and 8 rows of one tensor; that of 128 takes all of a row's columns.
struct RowMaps {
  CUtensorMap by128, by32, by8;
};

struct PrefillMaps {
  CUtensorMap q;
  RowMaps band_k, band_v, compact_k, compact_v;
};

// What a kernel needs beside the maps.
struct PrefillKernelArgs {
  const DmsPrefillSequence* sequences;
  PrefillScratch scratch;
  Bf16* out;
  int num_kv_heads, group, window, band_rows, positions;
  float scale_log2;  // scale * log2(e)
};

#if WINNOW_SM90A

// One box of the list, in pieces if it is not all of one part.
template <typename Shape>
__device__ __forceinline__ void LoadKeys(const TileWork& w, int first, const RowMaps& compact,
                                         const RowMaps& band, int no_row, uint8_t* to,
                                         uint64_t* full) {
  ptx::BarrierArriveExpect(full, Shape::kBoxBytes);
  int done = 0;
  while (done < Shape::kBoxKeys) {
    const int key = first + done;
    const RowMaps* maps = &band;
    int row = no_row, available = Shape::kBoxKeys;  // past the list: zeros
    if (key < w.padded) {
      maps = &compact;
      row = w.compact_row + key;
      available = w.padded - key;
    } else if (key < w.num_keys) {
      row = w.band_row + key - w.padded;
      available = w.num_keys - key;
    }
    uint8_t* at = to + done * 128;
    if (done == 0 && available >= 128) {
      ptx::LoadBox4(at, &maps->by128, full, 0, row, 0, w.head);
      return;
    }
    const bool wide = available >= 32 && done + 32 <= Shape::kBoxKeys;
    const CUtensorMap* map = wide ? &maps->by32 : &maps->by8;
#pragma unroll
    for (int half = 0; half < Shape::kHalves; ++half) {
      ptx::LoadBox4(at + half * Shape::kBoxKeys * 128, map, full, 0, row, half, w.head);
    }
    done += wide ? 32 : 8;
  }
}

// The stages of a ring of boxes: which, and the parity of its current turn.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename Shape>
__device__ __forceinline__ void Produce(const PrefillKernelArgs& args, const PrefillMaps& maps,
                                        PrefillShared<Shape>& shared) {
  Ring<Shape::kStages> k, v;
  Ring<2> work;
  uint32_t q_parity = 0;
  const int num_tiles = *args.scratch.num_tiles;
  while (true) {
    const int ticket = atomicAdd(args.scratch.ticket, 1);
    TileWork w{.head = -1};
    if (ticket < num_tiles) {
      const PrefillTile tile = args.scratch.tiles[ticket];
      const DmsPrefillSequence s = args.sequences[tile.sequence];
      const int position = s.num_prefix + tile.first;  // in the band
      const int oldest = max(0, position - args.window);
      w.head = tile.head;
      w.num_survivors = tile.num_survivors;
      w.padded = (tile.num_survivors + 7) & ~7;
      w.num_positions = min(args.positions, s.num_tokens - tile.first);
      w.num_keys = w.padded + position + w.num_positions - oldest;
      w.compact_row = s.compact_row;
      w.band_row = s.band_row + oldest;
      w.query_offset = position - oldest;
      w.row = s.row + tile.first;
    }
    ptx::BarrierWait(&shared.work_empty[work.stage], work.parity ^ 1);
    shared.work[work.stage] = w;
    ptx::BarrierArrive(&shared.work_full[work.stage]);
    work.Next();
    if (w.head < 0) return;

    const int boxes = (w.num_keys + Shape::kBoxKeys - 1) / Shape::kBoxKeys;
    for (int box = 0; box <= boxes; ++box) {
      if (box < boxes) {
        ptx::BarrierWait(&shared.k_empty[k.stage], k.parity ^ 1);
        LoadKeys<Shape>(w, box * Shape::kBoxKeys, maps.compact_k, maps.band_k, args.band_rows,
                        shared.k[k.stage], &shared.k_full[k.stage]);
        k.Next();
      }
      if (box == 0) {
        ptx::BarrierWait(&shared.q_empty, q_parity ^ 1);
        q_parity ^= 1;
        const uint32_t rows = static_cast<uint32_t>(args.positions * args.group);
        ptx::BarrierArriveExpect(&shared.q_full, rows * Shape::kDim * 2);
#pragma unroll
        for (int half = 0; half < Shape::kHalves; ++half) {
          ptx::LoadBox3(shared.q + half * Shape::kRows * 128, &maps.q, &shared.q_full, 64 * half,
                        w.head * args.group, w.row);
        }
      } else {
        ptx::BarrierWait(&shared.v_empty[v.stage], v.parity ^ 1);
        LoadKeys<Shape>(w, (box - 1) * Shape::kBoxKeys, maps.compact_v, maps.band_v, args.band_rows,
                        shared.v[v.stage], &shared.v_full[v.stage]);
        v.Next();
      }
    }
  }
}

// s = 64 query rows times a box of keys.
template <typename Shape>
__device__ __forceinline__ void IssueScores(float (&s)[64], const uint8_t* q, const uint8_t* k) {
#pragma unroll
  for (int step = 0; step < Shape::kDim / 16; ++step) {
    const int half = step / 4, in_half = step % 4 * 32;
    ptx::WgmmaSs128(s, ptx::SwizzledMatrix(q + half * Shape::kRows * 128 + in_half, 16),
                    ptx::SwizzledMatrix(k + half * Shape::kBoxKeys * 128 + in_half, 16), step > 0);
  }
  ptx::WgmmaCommit();
}

// o += weights times a box of values.
template <typename Shape>
__device__ __forceinline__ void IssueValues(float (&o)[Shape::kDim / 2], const uint32_t (&p)[32],
                                            const uint8_t* v) {
#pragma unroll
  for (int step = 0; step < Shape::kBoxKeys / 16; ++step) {
    ptx::WgmmaRs(o, p + 4 * step, ptx::SwizzledMatrix(v + step * 16 * 128, Shape::kBoxKeys * 128));
  }
  ptx::WgmmaCommit();
}

// Element 4 j + 2 r + e of a thread's scores is row r (of its two), key 8 j + 2 (lane % 4) + e.
struct RowView {
  int offset[2];    // of the rows' positions, from the first band key
  int first, last;  // offsets of the warpgroup's first and last position
};

// Sets what a row does not see to -infinity.
__device__ __forceinline__ void MaskScores(float (&s)[64], const TileWork& w, int first_key,
                                           const RowView& rows, const PrefillKernelArgs& args) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int32_t* marks = args.scratch.marks + int64_t{w.head} * args.band_rows + w.band_row;
  // Bit c of the four words: key c is seen whatever the window (survivor, or band and kept).
  uint32_t kept[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = first_key + 32 * i + lane;
    const bool in_band = key >= w.padded && key < w.num_keys;
    const bool bit = key < w.num_survivors || (in_band && (marks[key - w.padded] & 1) != 0);
    kept[i] = __ballot_sync(~0u, bit) >> (2 * (lane % 4));
  }
  const int shift = w.padded - first_key - 2 * (lane % 4);  // band key 0's column, from ours
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int newest = shift + rows.offset[r];
    const int oldest = shift + max(0, rows.offset[r] - args.window);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + e;
        const bool always = (kept[j / 4] >> (8 * (j % 4) + e) & 1) != 0;
        const bool seen = column <= newest && (column >= oldest || always);
        if (!seen) s[4 * j + 2 * r + e] = -INFINITY;
      }
    }
  }
}

// The running softmax of a thread's two rows.
struct Softmax {
  float max[2], sum[2];

  // Scores become weights; returns by what earlier sums and outputs shrink.
  __device__ __forceinline__ float2 Step(float (&s)[64], float scale_log2) {
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m0 = max[r], m1 = s[2 * r + 1];
      m0 = fmaxf(m0, s[2 * r]);
#pragma unroll
      for (int j = 1; j < 16; ++j) {
        m0 = fmaxf(m0, s[4 * j + 2 * r]);
        m1 = fmaxf(m1, s[4 * j + 2 * r + 1]);
      }
      float m = fmaxf(m0, m1);
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      const float base = m == -INFINITY ? 0.0f : m * scale_log2;
      shrink[r] = ptx::Exp2(fmaf(max[r], scale_log2, -base));
      max[r] = m;
      float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float& a = s[4 * j + 2 * r];
        float& b = s[4 * j + 2 * r + 1];
        a = ptx::Exp2(fmaf(a, scale_log2, -base));
        b = ptx::Exp2(fmaf(b, scale_log2, -base));
        sum0 += a;
        sum1 += b;
      }
      sum[r] = fmaf(sum[r], shrink[r], sum0 + sum1);
    }
    return make_float2(shrink[0], shrink[1]);
  }
};

// The A fragments of 64 rows times 128 weights.
__device__ __forceinline__ void PackWeights(const float (&s)[64], uint32_t (&p)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i] = ptx::PackBf16(s[2 * i], s[2 * i + 1]);
}

// Four lanes hold words of four 8-column blocks, a word of each block; afterwards lane l
// holds block l's four words: a 4x4 transposition.
__device__ __forceinline__ uint4 TransposeWords(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                                int lane) {
  const bool odd = (lane & 1) != 0, high = (lane & 2) != 0;
  const uint32_t x = __shfl_xor_sync(~0u, odd ? a : b, 1);
  const uint32_t y = __shfl_xor_sync(~0u, odd ? c : d, 1);
  if (odd) {
    a = x;
    c = y;
  } else {
    b = x;
    d = y;
  }
  // Even lanes: a, c of (word 0, 1 of blocks 0, 2) in (a, b) and (c, d); odd: blocks 1, 3.
  const uint32_t u = __shfl_xor_sync(~0u, high ? a : c, 2);
  const uint32_t z = __shfl_xor_sync(~0u, high ? b : d, 2);
  if (high) {
    a = u;
    b = z;
  } else {
    c = u;
    d = z;
  }
  return make_uint4(a, b, c, d);
}

template <typename Shape>
__device__ __forceinline__ void StoreOutput(const float (&o)[Shape::kDim / 2],
                                            const Softmax& softmax, const TileWork& w,
                                            const PrefillKernelArgs& args, int row0) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quad = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = softmax.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float inverse = 1.0f / sum;
    const int row = row0 + 8 * r, position = row / args.group, head = row % args.group;
    const bool owned = position < w.num_positions;
    Bf16* out = args.out + (int64_t{w.row + position} * args.num_kv_heads * args.group +
                            w.head * args.group + head) *
                               Shape::kDim;
#pragma unroll
    for (int j = 0; j < Shape::kDim / 8; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] =
            ptx::PackBf16(o[4 * (j + i) + 2 * r] * inverse, o[4 * (j + i) + 2 * r + 1] * inverse);
      }
      const uint4 block = TransposeWords(words[0], words[1], words[2], words[3], lane);
      if (owned) *reinterpret_cast<uint4*>(out + 8 * (j + quad)) = block;
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void Consume(const PrefillKernelArgs& args, PrefillShared<Shape>& shared,
                                        int warpgroup) {
  constexpr int kConsumerThreads = 128 * Shape::kConsumers;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool arrives = lane == 0;  // for its warp
  const int row0 = 64 * warpgroup + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
  // Warpgroups take turns at issuing, so that one's softmax meets the others' products.
  const auto take_turn = [&] { ptx::NamedSync(1 + warpgroup, kConsumerThreads); };
  const auto pass_turn = [&] {
#pragma unroll
    for (int i = 1; i < Shape::kConsumers; ++i) {
      ptx::NamedArrive(1 + (warpgroup + i) % Shape::kConsumers, kConsumerThreads);
    }
  };
  Ring<Shape::kStages> k, v;
  Ring<2> work;
  uint32_t q_parity = 0;
  const uint8_t* q = shared.q + warpgroup * 64 * 128;
  float s[64], o[Shape::kDim / 2];
  uint32_t p[32];
  // The first turn is warpgroup 0's; with three, 1 then lacks 2's pass and 2 both.
  for (int i = 0; i < warpgroup; ++i) ptx::NamedArrive(1 + i, kConsumerThreads);
  while (true) {
    ptx::BarrierWait(&shared.work_full[work.stage], work.parity);
    const TileWork& w = shared.work[work.stage];  // read as needed: registers are scarce
    if (w.head < 0) return;

    const int last_row = w.num_positions - 1;
    const RowView rows{.offset = {w.query_offset + min(row0 / args.group, last_row),
                                  w.query_offset + min((row0 + 8) / args.group, last_row)},
                       .first = w.query_offset + 64 * warpgroup / args.group,
                       .last = w.query_offset + min((64 * warpgroup + 63) / args.group, last_row)};
    const int boxes = (w.num_keys + Shape::kBoxKeys - 1) / Shape::kBoxKeys;
    // No mask: all survivors, or all in the band and seen by the first and the last row.
    const auto masked = [&](int first_key) {
      const int end = first_key + Shape::kBoxKeys;
      if (end <= w.num_survivors) return false;
      const int a = first_key - w.padded, z = end - 1 - w.padded;
      return !(a >= 0 && a >= rows.last - args.window && z <= rows.first);
    };
    Softmax softmax{.max = {-INFINITY, -INFINITY}, .sum = {0.0f, 0.0f}};
#pragma unroll
    for (int i = 0; i < Shape::kDim / 2; ++i) o[i] = 0.0f;

    ptx::BarrierWait(&shared.q_full, q_parity);
    q_parity ^= 1;
    ptx::BarrierWait(&shared.k_full[k.stage], k.parity);
    ptx::Pin(s);
    ptx::WgmmaFence();
    IssueScores<Shape>(s, q, shared.k[k.stage]);
    ptx::WgmmaWait<0>();
    ptx::Pin(s);
    if (arrives) ptx::BarrierArrive(&shared.k_empty[k.stage]);
    k.Next();
    if (masked(0)) MaskScores(s, w, 0, rows, args);
    softmax.Step(s, args.scale_log2);
    PackWeights(s, p);

    for (int box = 1; box < boxes; ++box) {
      ptx::BarrierWait(&shared.k_full[k.stage], k.parity);
      take_turn();
      ptx::Pin(s);
      ptx::Pin(o);
      ptx::WgmmaFence();
      IssueScores<Shape>(s, q, shared.k[k.stage]);
      ptx::BarrierWait(&shared.v_full[v.stage], v.parity);
      IssueValues<Shape>(o, p, shared.v[v.stage]);
      pass_turn();
      ptx::WgmmaWait<1>();
      ptx::Pin(s);
      if (arrives) ptx::BarrierArrive(&shared.k_empty[k.stage]);
      k.Next();
      if (masked(box * Shape::kBoxKeys)) {
        MaskScores(s, w, box * Shape::kBoxKeys, rows, args);
      }
      const float2 shrink = softmax.Step(s, args.scale_log2);
      ptx::WgmmaWait<0>();
      ptx::Pin(o);
      if (arrives) ptx::BarrierArrive(&shared.v_empty[v.stage]);
      v.Next();
#pragma unroll
      for (int i = 0; i < Shape::kDim / 2; ++i) o[i] *= (i & 2) == 0 ? shrink.x : shrink.y;
      PackWeights(s, p);
    }
    if (arrives) ptx::BarrierArrive(&shared.q_empty);
    ptx::BarrierWait(&shared.v_full[v.stage], v.parity);
    ptx::Pin(o);
    ptx::WgmmaFence();
    IssueValues<Shape>(o, p, shared.v[v.stage]);
    ptx::WgmmaWait<0>();
    ptx::Pin(o);
    if (arrives) ptx::BarrierArrive(&shared.v_empty[v.stage]);
    v.Next();
    StoreOutput<Shape>(o, softmax, w, args, row0);
    __syncwarp();
    if (arrives) ptx::BarrierArrive(&shared.work_empty[work.stage]);
    work.Next();
  }
}

#endif  // WINNOW_SM90A

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    PrefillSm90Kernel(const __grid_constant__ PrefillMaps maps,
                      const __grid_constant__ PrefillKernelArgs args) {
#if WINNOW_SM90A
  extern __shared__ uint8_t memory[];
  const uint32_t misaligned = ptx::SharedAddress(memory) & 1023;
  auto& shared =
      *reinterpret_cast<PrefillShared<Shape>*>(memory + (misaligned == 0 ? 0 : 1024 - misaligned));
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Shape::kConsumers;
    ptx::BarrierInit(&shared.q_full, 1);
    ptx::BarrierInit(&shared.q_empty, kConsumerWarps);
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::BarrierInit(&shared.k_full[i], 1);
      ptx::BarrierInit(&shared.v_full[i], 1);
      ptx::BarrierInit(&shared.k_empty[i], kConsumerWarps);
      ptx::BarrierInit(&shared.v_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::BarrierInit(&shared.work_full[i], 1);
      ptx::BarrierInit(&shared.work_empty[i], kConsumerWarps);
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (warpgroup == 0) {
    ptx::RegistersDown<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) Produce<Shape>(args, maps, shared);
  } else {
    ptx::RegistersUp<Shape::kConsumerRegisters>();
    Consume<Shape>(args, shared, warpgroup - 1);
  }
#endif
}

// The maps of a tensor whose rows (of `rows`, `row_stride` elements apart) are cut in
// 64-column pieces, `head_stride` elements from one head to the next.
inline absl::StatusOr<RowMaps> MakeRowMaps(const Bf16* base, int head_dim, int rows, int heads,
                                           int64_t row_stride, int64_t head_stride) {
  const uint64_t pieces = static_cast<uint64_t>(head_dim / 64);
  const uint64_t sizes[] = {64, static_cast<uint64_t>(rows), pieces, static_cast<uint64_t>(heads)};
  const uint64_t strides[] = {static_cast<uint64_t>(row_stride) * 2, 128,
                              static_cast<uint64_t>(head_stride) * 2};
  const auto make = [&](uint32_t box_rows, uint32_t box_pieces) {
    const uint32_t box[] = {64, box_rows, box_pieces, 1};
    return MakeBf16TensorMap(base, sizes, strides, box);
  };
  RowMaps maps;
  WINNOW_ASSIGN_OR_RETURN(maps.by128, make(128, static_cast<uint32_t>(pieces)));
  WINNOW_ASSIGN_OR_RETURN(maps.by32, make(32, 1));
  WINNOW_ASSIGN_OR_RETURN(maps.by8, make(8, 1));
  return maps;
}

template <typename Shape>
absl::Status EnqueuePrefillSm90(const DmsPrefillCudaParams& p, StreamHandle stream) {
  const DmsPrefillBatch& b = p.batch;
  const int positions = TilePositions(b.head_dim, b.group), heads = b.num_kv_heads * b.group;
  PrefillMaps maps;
  const uint64_t q_sizes[] = {static_cast<uint64_t>(b.head_dim), static_cast<uint64_t>(heads),
                              static_cast<uint64_t>(b.num_rows)};
  const uint64_t q_strides[] = {static_cast<uint64_t>(b.head_dim) * 2,
                                static_cast<uint64_t>(p.q_stride) * 2};
  const uint32_t q_box[] = {64, static_cast<uint32_t>(b.group), static_cast<uint32_t>(positions)};
  WINNOW_ASSIGN_OR_RETURN(maps.q, MakeBf16TensorMap(p.q, q_sizes, q_strides, q_box));
  const int64_t band_stride = int64_t{b.num_kv_heads} * b.head_dim;
  const int64_t compact_stride = int64_t{b.compact_rows} * b.head_dim;
  const auto band = [&](const Bf16* x) {
    return MakeRowMaps(x, b.head_dim, b.band_rows, b.num_kv_heads, band_stride, b.head_dim);
  };
  const auto compact = [&](const Bf16* x) {
    return MakeRowMaps(x, b.head_dim, b.compact_rows, b.num_kv_heads, b.head_dim, compact_stride);
  };
  WINNOW_ASSIGN_OR_RETURN(maps.band_k, band(b.band_k));
  WINNOW_ASSIGN_OR_RETURN(maps.band_v, band(b.band_v));
  WINNOW_ASSIGN_OR_RETURN(maps.compact_k, compact(b.compact_k));
  WINNOW_ASSIGN_OR_RETURN(maps.compact_v, compact(b.compact_v));

  constexpr int kSharedBytes = sizeof(PrefillShared<Shape>) + 1024;
  static_assert(kSharedBytes <= 227 * 1024);
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaFuncSetAttribute(
      PrefillSm90Kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)));
  int device = 0, num_sms = 0;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device)));
  WINNOW_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device)));
  const PrefillKernelArgs args{.sequences = b.sequences,
                               .scratch = ScratchOf(b),
                               .out = p.out,
                               .num_kv_heads = b.num_kv_heads,
                               .group = b.group,
                               .window = b.window,
                               .band_rows = b.band_rows,
                               .positions = positions,
                               .scale_log2 = p.scale * 1.44269504088896340736f};
  const int blocks = num_sms < MaxTiles(b) ? num_sms : MaxTiles(b);
  PrefillSm90Kernel<Shape>
      <<<static_cast<unsigned>(blocks), Shape::kThreads, kSharedBytes, stream>>>(maps, args);
  return CudaStatus(cudaGetLastError());
}

template <typename Shape>
bool HaveCode() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, PrefillSm90Kernel<Shape>) == cudaSuccess &&
         attributes.ptxVersion >= 90 && attributes.binaryVersion == 90;
}

}  // namespace winnow::kernels::internal
