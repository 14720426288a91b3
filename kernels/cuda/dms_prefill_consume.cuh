#pragma once

#include <cmath>

#include "kernels/cuda/dms_prefill_list.cuh"
#include "kernels/cuda/dms_prefill_produce.cuh"
#include "kernels/cuda/ptx.cuh"

// The consumers of a block of the prefill kernel for sm_90a (dms_prefill_sm90.cuh).
namespace winnow::kernels::internal {

#if WINNOW_SM90A

// Descriptors of what a warpgroup multiplies, the same in all lanes of a warp: known to be,
// they live in uniform registers, and a step's is an addition there.
struct Operand {
  uint32_t low;
  __device__ __forceinline__ Operand(const uint8_t* start, uint32_t leading_bytes)
      : low(__shfl_sync(~0u, static_cast<uint32_t>(ptx::SwizzledMatrix(start, leading_bytes)), 0)) {
  }
  __device__ __forceinline__ uint64_t operator+(int bytes) const {
    return uint64_t{ptx::kSwizzledMatrixHigh} << 32 | (low + static_cast<uint32_t>(bytes / 16));
  }
};

// s = 64 query rows times a box of keys.
template <typename Shape>
__device__ __forceinline__ void IssueScores(float (&s)[64], Operand q, Operand k) {
#pragma unroll
  for (int step = 0; step < Shape::kDim / 16; ++step) {
    const int half = step / 4, in_half = step % 4 * 32;
    ptx::WgmmaSs128(s, q + (half * Shape::kRows * 128 + in_half),
                    k + (half * kBoxKeys * 128 + in_half), step > 0);
  }
  ptx::WgmmaCommit();
}

// o (+)= weights times a box of values.
template <typename Shape>
__device__ __forceinline__ void IssueValues(float (&o)[Shape::kDim / 2], const uint32_t (&p)[32],
                                            Operand v, int accumulate) {
#pragma unroll
  for (int step = 0; step < kBoxKeys / 16; ++step) {
    ptx::WgmmaRs(o, p + 4 * step, v + step * 16 * 128, step > 0 || accumulate);
  }
  ptx::WgmmaCommit();
}

// Element 4 j + 2 r + e of a thread's scores is row r (of its two), key 8 j + 2 (lane % 4) + e.
// Sets the columns that a row does not see to -infinity.
__device__ __forceinline__ void MaskScores(float (&s)[64], const uint32_t (&seen)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < 32; ++n) {
      float& x = s[n / 2 * 4 + 2 * r + n % 2];
      x = (seen[r] >> n & 1) != 0 ? x : -INFINITY;
    }
  }
}

// The running softmax of a thread's two rows. Weights are 2^(score * scale_log2 - base).
struct Softmax {
  float base[2], sum[2];

  // Below any score, so that what was summed with it vanishes.
  __device__ __forceinline__ void Reset() {
    base[0] = base[1] = -0x1p100f;
    sum[0] = sum[1] = 0.0f;
  }

  // Raises the bases to the largest scores; returns by what earlier outputs shrink.
  __device__ __forceinline__ float2 Raise(const float (&s)[64], float scale_log2) {
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m0 = s[2 * r], m1 = s[2 * r + 1];
#pragma unroll
      for (int j = 1; j < 16; ++j) {
        m0 = fmaxf(m0, s[4 * j + 2 * r]);
        m1 = fmaxf(m1, s[4 * j + 2 * r + 1]);
      }
      float m = fmaxf(m0, m1);
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      m = fmaxf(base[r], m * scale_log2);
      shrink[r] = ptx::Exp2(base[r] - m);
      base[r] = m;
      sum[r] *= shrink[r];
    }
    return make_float2(shrink[0], shrink[1]);
  }

  // Scores become weights.
  __device__ __forceinline__ void Weigh(float (&s)[64], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float& a = s[4 * j + 2 * r];
        float& b = s[4 * j + 2 * r + 1];
        a = ptx::Exp2(fmaf(a, scale_log2, -base[r]));
        b = ptx::Exp2(fmaf(b, scale_log2, -base[r]));
        sum0 += a;
        sum1 += b;
      }
      sum[r] += sum0 + sum1;
    }
  }
};

// The A fragments of 64 rows times 128 weights.
__device__ __forceinline__ void PackWeights(const float (&s)[64], uint32_t (&p)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i] = ptx::PackBf16(s[2 * i], s[2 * i + 1]);
}

// Writes a thread's share of a tile's output. False: the sums are too large to trust it.
template <typename Shape>
__device__ __forceinline__ bool StoreOutput(const float (&o)[Shape::kDim / 2],
                                            const float (&sums)[2], const TileWork& w,
                                            const PrefillKernelArgs& args, int row0,
                                            const int (&position)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool odd = (lane & 1) != 0;
  const int heads = args.num_kv_heads * args.group;
  // A lane of a pair ends up with 4 columns side by side: of blocks 2 j and 2 j + 1.
  Bf16* tile = args.out + (int64_t{w.row} * heads + w.head * args.group) * Shape::kDim +
               (odd ? 8 : 0) + lane % 4 / 2 * 4;
  bool good = true;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = sums[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const bool owned = position[r] < w.num_positions;
    good = good && (sum < kMostSum || !owned);
    const float inverse = ptx::Reciprocal(sum);
    Bf16* out = tile + (row0 + 8 * r + position[r] * (heads - args.group)) * Shape::kDim;
#pragma unroll
    for (int j = 0; j < Shape::kDim / 8; j += 2) {
      const auto word = [&](int block) {
        return ptx::PackBf16(o[4 * block + 2 * r] * inverse, o[4 * block + 2 * r + 1] * inverse);
      };
      const uint32_t a = word(j), b = word(j + 1);
      const uint32_t other = __shfl_xor_sync(~0u, odd ? a : b, 1);
      const uint2 words = odd ? make_uint2(other, b) : make_uint2(a, other);
      if (owned) *reinterpret_cast<uint2*>(out + 8 * j) = words;
    }
  }
  return good;
}

template <typename Shape>
__device__ __forceinline__ void Consume(const PrefillKernelArgs& args, PrefillShared<Shape>& shared,
                                        int warpgroup) {
  constexpr int kConsumerThreads = 128 * Shape::kConsumers;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool arrives = ptx::ArrivesForWarp(lane);
  const int row0 = 64 * warpgroup + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
  const int position[2] = {row0 / args.group, (row0 + 8) / args.group};
  // Warpgroups take turns at issuing, so that one's softmax meets the others' products.
  const auto take_turn = [&] { ptx::NamedSync(1 + warpgroup, kConsumerThreads); };
  const auto pass_turn = [&] {
#pragma unroll
    for (int i = 1; i < Shape::kConsumers; ++i) {
      ptx::NamedArrive(1 + (warpgroup + i) % Shape::kConsumers, kConsumerThreads);
    }
  };
  float s[64], o[Shape::kDim / 2];
  uint32_t p[32];
  int n = 0, tile = 0;  // boxes and records so far: n of K, n - 1 of V
  const auto queries = [&] { return Operand(shared.q[tile & 1] + warpgroup * 64 * 128, 16); };
  const auto keys = [&](int stage) { return Operand(shared.k[stage], 16); };
  const auto values = [&](int stage) { return Operand(shared.v[stage], kBoxKeys * 128); };
  const auto release = [&](uint64_t* barrier) {
    if (arrives) ptx::BarrierArrive(barrier);
  };
  // Writes the output of record `of` and gives its place back.
  const auto finish = [&](const float(&sums)[2], int of) {
    const TileWork& w = shared.work[of & 1];
    const bool good = StoreOutput<Shape>(o, sums, w, args, row0, position);
    if (!good && w.careful == 0) shared.redo[of & 1] = 1;
    __syncwarp();
    release(&shared.work_empty[of & 1]);
  };
  const auto mask = [&](int box) {
    const TileWork& w = shared.work[tile & 1];
    const int quad = lane % 4;
    uint32_t seen[2];
    if (box * kBoxKeys < w.edge_end) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        seen[r] = shared.seen[tile & 1][box][min(position[r], w.num_positions - 1)][quad];
      }
    } else {
      seen[0] = seen[1] = ColumnsOfList(w, box, quad);
    }
    MaskScores(s, seen);
  };
  // The first turn is warpgroup 0's; with three, 1 then lacks 2's pass and 2 both.
  for (int i = 0; i < warpgroup; ++i) ptx::NamedArrive(1 + i, kConsumerThreads);
  while (true) {
    ptx::BarrierWait(&shared.work_full[tile & 1], Place<2>(tile).parity);
    if (const int head = shared.work[tile & 1].head; head < 0) {
      if (head == kEndOfTiles) return;
      __syncwarp();  // all lanes have read it
      release(&shared.work_empty[tile & 1]);
      ++tile;
      continue;
    }
    Softmax softmax;
    softmax.Reset();
    int box = 0;        // of the tile
    int raising, last;  // boxes below `raising` raise the bases; `last` may be part empty
    const auto begin = [&] {
      const TileWork& w = shared.work[tile & 1];
      last = (w.num_keys - 1) / kBoxKeys;
      raising = w.careful != 0 ? last + 1 : (w.edge_end + kBoxKeys - 1) / kBoxKeys;
      box = 0;
      ptx::BarrierWait(&shared.q_full[tile & 1], Place<2>(tile).parity);
    };
    begin();
    {
      const Place<Shape::kStages> stage(n);
      ptx::BarrierWait(&shared.k_full[stage.at], stage.parity);
      ptx::Pin(s);
      ptx::WgmmaFence();
      IssueScores<Shape>(s, queries(), keys(stage.at));
      ptx::WgmmaWait<0>();
      ptx::Pin(s);
      release(&shared.k_empty[stage.at]);
      mask(0);
      softmax.Raise(s, args.scale_log2);
      softmax.Weigh(s, args.scale_log2);
      PackWeights(s, p);
      ptx::BarrierWait(&shared.v_full[stage.at], stage.parity);
    }

    while (true) {
      ++n;
      const bool fresh = box == last;  // the next box is another tile's first
      const int accumulate = box;      // not the first weights
      if (fresh) {
        ++tile;
        ptx::BarrierWait(&shared.work_full[tile & 1], Place<2>(tile).parity);
        if (shared.work[tile & 1].head < 0) break;
        begin();
      } else {
        ++box;
      }
      const Place<Shape::kStages> k(n), v(n - 1);
      ptx::BarrierWait(&shared.k_full[k.at], k.parity);
      const Operand q_now = queries(), k_now = keys(k.at), v_now = values(v.at);
      take_turn();
      ptx::Pin(s);
      ptx::Pin(o);
      ptx::WgmmaFence();
      IssueScores<Shape>(s, q_now, k_now);
      ptx::WgmmaFence();  // without it the compiler serializes the products
      IssueValues<Shape>(o, p, v_now, accumulate);
      pass_turn();
      ptx::WgmmaWait<1>();
      ptx::Pin(s);
      release(&shared.k_empty[k.at]);
      const TileWork& w = shared.work[tile & 1];
      if (box * kBoxKeys < w.edge_end || (box + 1) * kBoxKeys > w.num_keys) mask(box);
      const float sums[2] = {softmax.sum[0], softmax.sum[1]};
      if (fresh) softmax.Reset();
      float2 shrink;
      const bool raise = box < raising;
      if (raise) shrink = softmax.Raise(s, args.scale_log2);
      softmax.Weigh(s, args.scale_log2);
      // Neither compiler may move the exponentials past the wait: they belong beside the product.
      ptx::Pin(s);
      ptx::BarrierWait(&shared.v_full[k.at], k.parity);
      ptx::WgmmaWait<0>();
      ptx::Pin(o);
      release(&shared.v_empty[v.at]);
      if (fresh) {
        finish(sums, tile - 1);
      } else if (raise) {
#pragma unroll
        for (int i = 0; i < Shape::kDim / 2; ++i) o[i] *= (i & 2) == 0 ? shrink.x : shrink.y;
      }
      PackWeights(s, p);
    }
    const Place<Shape::kStages> v(n - 1);
    ptx::Pin(o);
    ptx::WgmmaFence();
    IssueValues<Shape>(o, p, values(v.at), last);
    ptx::WgmmaWait<0>();
    ptx::Pin(o);
    release(&shared.v_empty[v.at]);
    finish(softmax.sum, tile - 1);
  }
}

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::internal
