#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/dms_prefill_fp8_produce.cuh"
#include "kernels/cuda/dms_prefill_fp8_softmax.cuh"

// A warpgroup of the FP8 prefill: 64 rows of a tile.
namespace winnow::kernels::internal {

#if WINNOW_SM90A

// A warp's 16 rows of queries to e4m3, rows of nobody as zeros. Returns what a unit of the
// codes stands for, a power of two.
template <typename Shape>
__device__ __forceinline__ float QuantizeQueries(const PrefillFp8Args& args, const Fp8TileWork& w,
                                                 PrefillFp8Shared<Shape>& shared, int first_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32, column = lane % 16;
  uint4 x[8];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = first_row + 2 * i + lane / 16, position = row / args.group;
    x[i] = make_uint4(0, 0, 0, 0);
    if (position < w.num_positions) {
      const int head = w.head * args.group + row - position * args.group;
      x[i] = *reinterpret_cast<const uint4*>(args.q + (w.row + position) * args.q_stride +
                                             head * Shape::kDim + 8 * column);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    for (const uint32_t pair : {x[i].x, x[i].y, x[i].z, x[i].w}) {
      const uint32_t lo = pair & 0x7fff, hi = pair >> 16 & 0x7fff;
      if (lo < 0x7f80) largest = max(largest, lo);
      if (hi < 0x7f80) largest = max(largest, hi);
    }
  }
  largest = __reduce_max_sync(~0u, largest);
  // The largest code is in [128, 256), if the scale's exponent allows.
  const uint32_t exponent = min(261 - (largest >> 7), 253u);
  const float scale = __uint_as_float(exponent << 23);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = first_row + 2 * i + lane / 16;
    const uint32_t pairs[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
    float y[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      y[n] = scale * __uint_as_float(n % 2 == 0 ? pairs[n / 2] << 16 : pairs[n / 2] & 0xffff0000u);
      y[n] += 0.0f * y[n];  // an infinity would saturate: a NaN
    }
    *reinterpret_cast<uint2*>(shared.q + row / 8 * 1024 + column / 2 * 128 + row % 8 * 16 +
                              column % 2 * 8) =
        make_uint2(ptx::PackE4m3(y[0], y[1], y[2], y[3]), ptx::PackE4m3(y[4], y[5], y[6], y[7]));
  }
  return __uint_as_float((254 - exponent) << 23);
}

// s = the codes' products of 64 query rows with kStepKeys keys.
template <typename Shape>
__device__ __forceinline__ void IssueScoresFp8(float (&s)[32], uint64_t queries, uint64_t keys) {
#pragma unroll
  for (int step = 0; step < Shape::kDim / 32; ++step) {
    ptx::WgmmaE4m3Ss(s, queries + step * (256 / 16), keys + step * (256 / 16), step > 0);
  }
}

// o += weights times the value codes of kStepKeys keys.
template <typename Shape>
__device__ __forceinline__ void IssueValuesFp8(float (&o)[64], const uint32_t (&p)[8],
                                               uint64_t values) {
#pragma unroll
  for (int step = 0; step < Shape::kStepKeys / 32; ++step) {
    ptx::WgmmaE4m3Rs(o, p + 4 * step, values + step * (4096 / 16));
  }
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

__device__ __forceinline__ void StoreOutputFp8(const float (&o)[64], const float (&sums)[2],
                                               const Fp8TileWork& w, const PrefillFp8Args& args,
                                               int row0) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quad = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = sums[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float inverse = 1.0f / sum;
    const int row = row0 + 8 * r, position = row / args.group, head = row % args.group;
    const bool owned = position < w.num_positions;
    Bf16* out = args.out + (int64_t{w.row + position} * args.num_kv_heads * args.group +
                            w.head * args.group + head) *
                               kPrefillFp8Dim;
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = o + 4 * (j + i) + 2 * r;
        words[i] = ptx::PackBf16(x[0] * inverse, x[1] * inverse);
      }
      const uint4 block = TransposeQuad(words[0], words[1], words[2], words[3], lane);
      if (owned) *reinterpret_cast<uint4*>(out + 8 * (j + quad)) = block;
    }
  }
}

// Adds `o` to what is saved (if something is) times `shrink`, in float32. What is
// saved is then 0 in `o` if that goes on, the sum otherwise.
template <int kStride>
__device__ __forceinline__ void SaveOutput(float (&o)[64], float (&shrink)[2], bool saved,
                                           bool last, float4* to) {
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    float4 x = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
    if (saved) {
      const float4 y = to[i / 4 * kStride];
      x.x = fmaf(y.x, shrink[0], x.x);
      x.y = fmaf(y.y, shrink[0], x.y);
      x.z = fmaf(y.z, shrink[1], x.z);
      x.w = fmaf(y.w, shrink[1], x.w);
    }
    if (!last) to[i / 4 * kStride] = x;
    o[i] = last ? x.x : 0.0f;
    o[i + 1] = last ? x.y : 0.0f;
    o[i + 2] = last ? x.z : 0.0f;
    o[i + 3] = last ? x.w : 0.0f;
  }
  shrink[0] = shrink[1] = 1.0f;
}

// What a warpgroup knows of its place.
struct Fp8Place {
  int warpgroup;
  __device__ __forceinline__ int WarpRow() const {
    return 64 * warpgroup + static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  }
  // The thread's first row; its other is 8 on.
  __device__ __forceinline__ int Row() const {
    return WarpRow() + static_cast<int>(threadIdx.x) % 32 / 4;
  }
  // Of a row's position, from list key w.band_start; rows of nobody count as the last.
  __device__ __forceinline__ int Offset(int row, const Fp8TileWork& w, int group) const {
    return w.query_offset + min(row / group, w.num_positions - 1);
  }
};

// Steps that need no mask: all survivors, or all in the band and seen by the warpgroup's rows.
struct Fp8Unmasked {
  int survivors_end, band_first, band_end;

  __device__ __forceinline__ Fp8Unmasked(const Fp8TileWork& w, const Fp8Place& place,
                                         const PrefillFp8Args& args) {
    const int row = 64 * place.warpgroup;
    const int oldest = place.Offset(row + 63, w, args.group) - args.window;
    survivors_end = w.num_survivors;
    band_first = w.band_start + max(0, oldest);
    band_end = w.band_start + place.Offset(row, w, args.group) + 1;
  }
  __device__ __forceinline__ bool Has(int first, int end) const {
    return end <= survivors_end || (first >= band_first && end <= band_end);
  }
};

// A warpgroup's way through a tile, in steps of kStepKeys keys, two a box.
template <typename Shape>
struct Fp8Consumer {
  const PrefillFp8Args& args;
  PrefillFp8Shared<Shape>& shared;
  const Fp8Place place;
  const uint64_t queries, keys, values;  // descriptors: of the warpgroup's, the first stage's
  Fp8Ring<Shape::kStages> box;           // of the current step
  float q_scale;
  float s[32], o[64];
  uint32_t p[8];
  Fp8Softmax softmax;
  float saved_shrink[2];  // of what is in shared.o

  __device__ __forceinline__ Fp8Consumer(const PrefillFp8Args& a, PrefillFp8Shared<Shape>& sh,
                                         int warpgroup)
      : args(a),
        shared(sh),
        place{warpgroup},
        queries(ptx::BlockedMatrix(sh.q + warpgroup * 64 * Shape::kDim, 128, 1024)),
        keys(ptx::BlockedMatrix(sh.k, 128, 1024)),
        values(ptx::BlockedMatrix(sh.v, 2048, 128)) {}

  __device__ __forceinline__ void Arrive(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::BarrierArrive(barrier);
  }
  static __device__ __forceinline__ uint32_t HalfOf(int stage, int half) {
    return static_cast<uint32_t>(2 * stage + half) * (Shape::kBoxBytes / 2 / 16);
  }
  static __device__ __forceinline__ int Before(int stage) {
    return stage == 0 ? Shape::kStages - 1 : stage - 1;
  }
  __device__ __forceinline__ void Save(bool saved, bool last) {
    SaveOutput<128 * Shape::kConsumers>(o, saved_shrink, saved, last,
                                        &shared.o[0][threadIdx.x - 128]);
  }

  // Half kHalf of the tile's box that begins with `first_key`, whose scores are under way,
  // as are the values of the step before. Scores past the last box are not looked at.
  template <int kHalf>
  __device__ __forceinline__ void Step(const Fp8TileWork& w, const Fp8Unmasked& unmasked,
                                       int first_key) {
    const int stage = box.stage;
    ScaleScores(s, shared.scales[stage] + 2 * kHalf * Shape::kStepKeys, q_scale);
    const int first = first_key + kHalf * Shape::kStepKeys;
    if (!unmasked.Has(first, first + Shape::kStepKeys)) {
      const int offset[2] = {place.Offset(place.Row(), w, args.group),
                             place.Offset(place.Row() + 8, w, args.group)};
      MaskScoresFp8(s, w, first, offset, args);
    }
    ptx::WgmmaWait<0>();
    ptx::Pin(o);
    if (kHalf == 0 && first_key > 0) {
      Arrive(&shared.v_empty[Before(stage)]);
      if (first_key % Shape::kSaveKeys == 0) Save(first_key > Shape::kSaveKeys, false);
    }
    const float* inverses = shared.inverses[stage] + kHalf * Shape::kStepKeys;
    float sums[2];
    const bool past = softmax.Pack(s, inverses, p, sums);
    if (__any_sync(~0u, past)) {  // rare, but for a tile's first step
      float shrink[2];
      softmax.Follow(s, shrink);
#pragma unroll
      for (int n = 0; n < 64; ++n) o[n] *= shrink[n / 2 % 2];
      saved_shrink[0] *= shrink[0];
      saved_shrink[1] *= shrink[1];
      softmax.Pack(s, inverses, p, sums);
    }
    softmax.sum[0] = sums[0];
    softmax.sum[1] = sums[1];
    if (kHalf == 0) {
      ptx::BarrierWait(&shared.v_full[stage], box.parity);
    } else {
      Arrive(&shared.k_empty[stage]);
      box.Next();
      if (first_key + Shape::kBoxKeys < w.num_keys) {
        ptx::BarrierWait(&shared.k_full[box.stage], box.parity);
      }
    }
    ptx::Pin(s);
    ptx::Pin(o);
    ptx::WgmmaFence();
    IssueScoresFp8<Shape>(s, queries, keys + HalfOf(box.stage, kHalf ^ 1));
    ptx::WgmmaCommit();
    IssueValuesFp8<Shape>(o, p, values + HalfOf(stage, kHalf));
    ptx::WgmmaCommit();
    ptx::WgmmaWait<1>();
    ptx::Pin(s);
  }

  __device__ __forceinline__ void Tile(const Fp8TileWork& w) {
    const Fp8Unmasked unmasked(w, place, args);
    softmax = Fp8Softmax();
    saved_shrink[0] = saved_shrink[1] = 1.0f;
#pragma unroll
    for (float& x : o) x = 0.0f;
    ptx::BarrierWait(&shared.k_full[box.stage], box.parity);
    ptx::Pin(s);
    ptx::WgmmaFence();
    IssueScoresFp8<Shape>(s, queries, keys + HalfOf(box.stage, 0));
    ptx::WgmmaCommit();
    ptx::WgmmaWait<0>();
    ptx::Pin(s);
    for (int key = 0; key < w.num_keys; key += Shape::kBoxKeys) {
      Step<0>(w, unmasked, key);
      Step<1>(w, unmasked, key);
    }
    ptx::WgmmaWait<0>();
    ptx::Pin(o);
    Arrive(&shared.v_empty[Before(box.stage)]);
    if (w.num_keys > Shape::kSaveKeys) Save(true, true);
    StoreOutputFp8(o, softmax.sum, w, args, place.Row());
  }

  __device__ __forceinline__ void Run() {
    for (uint32_t tile = 0;; ++tile) {
      ptx::BarrierWait(&shared.work_full[tile % 2], tile / 2 % 2);
      const Fp8TileWork& w = shared.work[tile % 2];
      if (w.head < 0) return;
      ptx::NamedSync(1 + place.warpgroup, 128);  // the products with the codes before are done
      q_scale = QuantizeQueries(args, w, shared, place.WarpRow()) * args.scale_log2;
      ptx::FenceForWgmma();
      ptx::NamedSync(1 + place.warpgroup, 128);
      Tile(w);
      Arrive(&shared.work_empty[tile % 2]);
    }
  }
};

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
