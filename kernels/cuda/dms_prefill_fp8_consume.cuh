#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/dms_prefill_fp8_produce.cuh"
#include "kernels/cuda/dms_prefill_fp8_softmax.cuh"

// The consumers of a block of the FP8 prefill: as dms_prefill_consume.cuh, in e4m3.
namespace winnow::kernels::internal {

#if WINNOW_SM90A

// Descriptors as Operand's, of matrices in blocks without a swizzle.
template <uint32_t kColumnBytes, uint32_t kRowBytes>
struct BlockedOperand {
  uint32_t low;
  __device__ __forceinline__ explicit BlockedOperand(const uint8_t* start)
      : low(__shfl_sync(
            ~0u, static_cast<uint32_t>(ptx::BlockedMatrix(start, kColumnBytes, kRowBytes)), 0)) {}
  __device__ __forceinline__ uint64_t operator+(uint32_t bytes) const {
    return uint64_t{kRowBytes / 16} << 32 | (low + bytes / 16);
  }
};
using RowOperand = BlockedOperand<128, 1024>;
using ValueOperand = BlockedOperand<16 * kPrefillFp8Channels, 128>;

// s = the codes' products of 64 query rows with a box of keys.
template <typename Shape>
__device__ __forceinline__ void IssueScoresFp8(uint32_t (&s)[32], RowOperand q, RowOperand k) {
#pragma unroll
  for (uint32_t step = 0; step < Shape::kDim / 32; ++step) {
    ptx::WgmmaE4m3Ss128(s, q + step * 256, k + step * 256, step > 0);
  }
  ptx::WgmmaCommit();
}

// o (+)= weights times a box of value codes.
template <typename Shape>
__device__ __forceinline__ void IssueValuesFp8(float (&o)[68], const uint32_t (&p)[16],
                                               ValueOperand v, int accumulate) {
#pragma unroll
  for (uint32_t step = 0; step < kBoxKeys / 32; ++step) {
    ptx::WgmmaE4m3Rs136(o, p + 4 * step, v + step * 32 * Shape::kChannels,
                        step > 0 || accumulate != 0);
  }
  ptx::WgmmaCommit();
}

// Four lanes hold words of four 8-column blocks, a word of each block; afterwards lane l
// holds block l's four words: a 4x4 transposition.
__device__ __forceinline__ uint4 TransposeQuad(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
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

// What a thread has of a tile's outputs: rows row0 and row0 + 8, which are `position`'s.
template <typename Shape>
struct Fp8Output {
  float o[68];          // of the boxes since the last Save()
  int boxes = 0;        // in it
  bool saved = false;   // whether `to` and saved_sum hold something
  float2 saved_shrink;  // by which that has shrunk since
  float saved_sum[2];
  float4* to;  // in shared memory, a thread's own: [16][stride of the consumers' threads]

  static constexpr int kStride = 128 * Shape::kConsumers;

  __device__ __forceinline__ void Shrink(float2 by) {
#pragma unroll
    for (int i = 0; i < 68; ++i) o[i] *= (i & 2) == 0 ? by.x : by.y;
    saved_shrink.x *= by.x;
    saved_shrink.y *= by.y;
  }

  // This lane's part of the sum of row r's weights.
  __device__ __forceinline__ float Sum(int r) const {
    return fmaf(o[65 + 2 * r], 0.0625f, o[64 + 2 * r]);
  }

  // Moves the outputs to shared memory, where they are added in float32.
  __device__ __forceinline__ void Save() {
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      float4 x = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
      if (saved) x = Added(x, to[i / 4 * kStride]);
      to[i / 4 * kStride] = x;
    }
    const float sums[2] = {Sum(0), Sum(1)};
    saved_sum[0] = saved ? fmaf(saved_sum[0], saved_shrink.x, sums[0]) : sums[0];
    saved_sum[1] = saved ? fmaf(saved_sum[1], saved_shrink.y, sums[1]) : sums[1];
    saved_shrink = make_float2(1.0f, 1.0f);
    saved = true;
    boxes = 0;
  }

  // Writes the tile's output.
  __device__ __forceinline__ void Store(const Fp8TileWork& w, const PrefillFp8Args& args, int row0,
                                        const int (&position)[2]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, quad = lane % 4;
    float sums[2] = {Sum(0), Sum(1)};
    if (saved) {
      sums[0] = fmaf(saved_sum[0], saved_shrink.x, sums[0]);
      sums[1] = fmaf(saved_sum[1], saved_shrink.y, sums[1]);
#pragma unroll
      for (int i = 0; i < 64; i += 4) {
        const float4 x =
            Added(make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]), to[i / 4 * kStride]);
        o[i] = x.x;
        o[i + 1] = x.y;
        o[i + 2] = x.z;
        o[i + 3] = x.w;
      }
    }
    const float factor = PrefillFp8SumFactor(quad);
    const int heads = args.num_kv_heads * args.group;
    Bf16* tile = args.out + (int64_t{w.row} * heads + w.head * args.group) * Shape::kDim + 8 * quad;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sums[r] * factor;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float inverse = 1.0f / sum;
      Bf16* out = tile + (row0 + 8 * r + position[r] * (heads - args.group)) * Shape::kDim;
#pragma unroll
      for (int j = 0; j < 16; j += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* x = o + 4 * (j + i) + 2 * r;
          words[i] = ptx::PackBf16(x[0] * inverse, x[1] * inverse);
        }
        const uint4 block = TransposeQuad(words[0], words[1], words[2], words[3], lane);
        if (position[r] < w.num_positions) *reinterpret_cast<uint4*>(out + 8 * j) = block;
      }
    }
    saved = false;
    boxes = 0;
  }

 private:
  __device__ __forceinline__ float4 Added(float4 x, float4 y) const {
    return make_float4(fmaf(y.x, saved_shrink.x, x.x), fmaf(y.y, saved_shrink.x, x.y),
                       fmaf(y.z, saved_shrink.y, x.z), fmaf(y.w, saved_shrink.y, x.w));
  }
};

// 64 rows of every tile of the block, by a warpgroup.
template <typename Shape>
__device__ __forceinline__ void ConsumeFp8(const PrefillFp8Args& args,
                                           PrefillFp8Shared<Shape>& shared, int warpgroup) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool arrives = ptx::ArrivesForWarp(lane);
  const int row0 = 64 * warpgroup + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
  const int position[2] = {row0 / args.group, (row0 + 8) / args.group};
  uint32_t s[32], p[16];
  Fp8Output<Shape> output;
  output.to = &shared.o[0][threadIdx.x % Fp8Output<Shape>::kStride];
  Fp8Softmax softmax;
  // Of the tile's boxes, those below `raising` raise; the last one's columns from num_keys on
  // are nobody's.
  int tile = 0, box, raising, last;
  ptx::RingPlace k, v;
  const auto release = [&](uint64_t* barrier) {
    __syncwarp();
    if (arrives) ptx::BarrierArrive(barrier);
  };
  const auto queries = [&] {
    return RowOperand(shared.q[tile & 1] + warpgroup * 64 * Shape::kDim);
  };
  // Whether there is another tile, `tile`; then its state is set up.
  const auto begin = [&] {
    ptx::BarrierWait(&shared.work_full[tile & 1], Place<2>(tile).parity);
    const Fp8TileWork& w = shared.work[tile & 1];
    if (w.head < 0) return false;
    last = (w.num_keys - 1) / kBoxKeys;
    raising = (w.edge_end + kBoxKeys - 1) / kBoxKeys;
    box = 0;
    ptx::BarrierWait(&shared.q_full[tile & 1], Place<2>(tile).parity);
    return true;
  };
  const auto finish = [&](int of) {
    output.Store(shared.work[of & 1], args, row0, position);
    release(&shared.work_empty[of & 1]);
  };
  const auto mask = [&] {
    const Fp8TileWork& w = shared.work[tile & 1];
    const int quad = lane % 4;
    uint32_t seen[2];
    if (box < raising) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        seen[r] = shared.seen[tile & 1][box][min(position[r], w.num_positions - 1)][quad];
      }
    } else {
      seen[0] = seen[1] = ColumnsOfList(w, box, quad);
    }
    MaskScoresFp8(s, seen);
  };
  const auto fresh_softmax = [&] {
    const float* units = shared.q_unit[tile & 1];
    softmax.Reset(units[row0] * args.exponent_scale, units[row0 + 8] * args.exponent_scale);
  };
  if (!begin()) return;
  ptx::BarrierWait(&shared.k_full[k.at], k.parity);
  RowOperand q_now = queries();
  ptx::Pin(s);
  ptx::WgmmaFence();
  IssueScoresFp8<Shape>(s, q_now, RowOperand(shared.k[k.at]));
  ptx::WgmmaWait<0>();
  ptx::Pin(s);
  mask();
  fresh_softmax();
  softmax.Raise(s, shared.scales[k.at]);
  softmax.Weigh(s, shared.scales[k.at], p);
  release(&shared.k_empty[k.at]);
  ptx::BarrierWait(&shared.v_full[v.at], v.parity);
  k.Next(Shape::kStages);
  RowOperand k_now(shared.k[k.at]);
  ValueOperand v_now(shared.v[v.at]);

  while (true) {
    const bool fresh = box == last;  // the next box is another tile's first
    if (fresh) {
      ++tile;
      if (!begin()) break;
      q_now = queries();
    } else {
      ++box;
    }
    ptx::BarrierWait(&shared.k_full[k.at], k.parity);
    ptx::Pin(s);
    ptx::Pin(output.o);
    ptx::WgmmaFence();
    IssueScoresFp8<Shape>(s, q_now, k_now);
    ptx::WgmmaFence();  // without it the compiler serializes the products
    IssueValuesFp8<Shape>(output.o, p, v_now, output.boxes);
    ++output.boxes;
    // What the next box needs, while the scores are under way.
    const uint16_t* scales = shared.scales[k.at];
    uint64_t* const k_done = &shared.k_empty[k.at];
    uint64_t* const v_done = &shared.v_empty[v.at];
    k.Next(Shape::kStages);
    v.Next(Shape::kStages);
    k_now = RowOperand(shared.k[k.at]);
    v_now = ValueOperand(shared.v[v.at]);
    ptx::WgmmaWait<1>();
    ptx::Pin(s);
    float2 shrink;
    bool raise = false;
    if (box < raising || box == last) {
      mask();
      if (fresh) fresh_softmax();
      raise = box < raising;
      if (raise) shrink = softmax.Raise(s, scales);
    }
    uint32_t weights[16];
    const bool past = softmax.Weigh(s, scales, weights);
    if (__any_sync(~0u, past) && !raise) {
      raise = true;
      shrink = softmax.Raise(s, scales);
      softmax.Weigh(s, scales, weights);
    }
    // Neither compiler may move the exponents past the wait: they belong beside the product.
    ptx::Pin(weights);
    release(k_done);
    ptx::BarrierWait(&shared.v_full[v.at], v.parity);
    ptx::WgmmaWait<0>();
    ptx::Pin(output.o);
    ptx::Pin(p);  // read until here
    release(v_done);
    if (fresh) {
      finish(tile - 1);
    } else if (raise) {
      output.Shrink(shrink);
    }
    if (output.boxes == Shape::kSaveBoxes) output.Save();
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = weights[i];
  }
  ptx::Pin(output.o);
  ptx::WgmmaFence();
  IssueValuesFp8<Shape>(output.o, p, ValueOperand(shared.v[v.at]), output.boxes);
  ptx::WgmmaWait<0>();
  ptx::Pin(output.o);
  release(&shared.v_empty[v.at]);
  finish(tile - 1);
}

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
