#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/compact_decode_attention.h"
#include "kernels/cuda/mma_sync.cuh"

// The kernel of compact_decode_attention; one file an instantiation includes this.
//
// Grid: as many blocks as fit the device, of 4 warps; each takes pieces of the plan, its
// first two by index, the rest from a counter. Of a piece's pages warp w takes w, w + 4, ...
// straight from global memory to registers in the layout of the matrix instruction: heads
// are the 16 rows (8 heads as high halves, the same 8 as low ones), keys the columns of
// Q K^T, channels those of P V. A page's loads are issued as soon as the registers of the
// one before are used up, also across pieces. The warps' results are merged in shared
// memory, the pieces' by the block that finishes a span's last one, both in index order.
namespace winnow::kernels::device {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = 32 * kDecodeWarps;
static_assert(kDecodeWarps == kPagesPerUnit);

struct CompactDecodeArgs {
  const DecodePiece* pieces;
  const int32_t* num_pieces;
  int32_t* next_piece;  // [2]: pieces handed out, blocks done
  int32_t* arrivals;
  float* partial_out;
  float* partial_norm;
  const uint8_t* pages;
  const int32_t* survivor_pages;  // of the layer, as are the next two
  const int32_t* ring_pages;
  const uint8_t* newest;
  const float* q;
  float* out_f32;
  Bf16* out_bf16;
  int64_t newest_stride;
  int max_survivor_pages, ring_pages_per_span;
  int max_pieces;
  int group;
  float scale_log2;  // scale * log2(e)
  bool rotated;
};

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
  static constexpr int kSteps = kDim / 16;        // of 16 channels, Q K^T
  static constexpr int kOutTiles = kDim / 8;      // of 8 channels, P V
  static constexpr int kKVecs = kRowBytes / 64;   // 16-byte vectors a lane of a K row
  static constexpr int kVWords = kRowBytes / 32;  // 4-byte words a lane of a V row

  // First of the four channels of step s of lane column c: channels may be summed in any
  // order that K and Q share, here the one in which 16-byte vectors arrive.
  static __device__ __forceinline__ int QChannel(int s, int c) {
    return kBytes == 1 ? (s / 4) * 64 + c * 16 + (s % 4) * 4 : (s / 2) * 32 + c * 8 + (s % 2) * 4;
  }
  // The channel of column n of P V's tile j.
  static __device__ __forceinline__ int VChannel(int n, int j) {
    return kBytes == 1 ? n * kOutTiles + j : (j / 8) * 64 + n * 8 + j % 8;
  }
};

template <KvElement kE, int kHalf>
__device__ __forceinline__ uint32_t ToOperand(uint32_t w) {
  if constexpr (kE == KvElement::kE4m3) return E4m3PairToF16<kHalf>(w);
  return Int8PairToF16<kHalf>(w);
}

__device__ __forceinline__ uint64_t StreamPolicy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 4 kWords bytes if `take`, else zeros. Each cached byte is read once a step.
template <int kWords>
__device__ __forceinline__ void LoadStream(const uint8_t* p, bool take, uint64_t policy,
                                           uint32_t* out) {
  static_assert(kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.b32 p, %5, 0;\n"
        " mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
        " @p ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %6;\n}"
        : "=&r"(out[0]), "=&r"(out[1]), "=&r"(out[2]), "=&r"(out[3])
        : "l"(p), "r"(static_cast<int>(take)), "l"(policy));
  } else {
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.b32 p, %3, 0;\n mov.b32 %0, 0;\n mov.b32 %1, 0;\n"
        " @p ld.global.nc.L1::no_allocate.L2::cache_hint.v2.b32 {%0, %1}, [%2], %4;\n}"
        : "=&r"(out[0]), "=&r"(out[1])
        : "l"(p), "r"(static_cast<int>(take)), "l"(policy));
  }
}

__device__ __forceinline__ float PowerOfTwo(int exponent) {
  return __int_as_float((127 + exponent) << 23);
}

// One page of the list: where its tokens lie and how many of them are live.
struct DecodePage {
  const uint8_t* base = nullptr;
  int slots = 0;  // 1: the newest token's flat row
  int count = 0;  // 0: none
};

// A piece as the warp's lanes hold it, a word each.
struct PieceWords {
  int word = 0;
  __device__ __forceinline__ int Get(int field) const {
    return __shfl_sync(0xffffffffu, word, field);
  }
};
enum PieceField {
  kRow,
  kSpan,
  kFirstPage,
  kNumPages,
  kPiece,
  kNumPieces,
  kPartial,
  kNumSurvivors,
  kNumRing,
  kPage0
};

template <KvElement kK, KvElement kV, int kDim>
class DecodeWarp {
 public:
  using S = DecodeShape<kK, kV, kDim>;

  __device__ __forceinline__ DecodeWarp(const CompactDecodeArgs& args, int warp, int lane)
      : args_(args),
        warp_(warp),
        lane_(lane),
        r_(lane / 4),
        c_(lane % 4),
        policy_(StreamPolicy()) {}

  // Pages of a piece that this warp takes.
  __device__ __forceinline__ int NumRounds(int num_pages) const {
    return (num_pages - warp_ + kDecodeWarps - 1) / kDecodeWarps;
  }

  // The ids of 32 of the warp's pages from `round` on, one a lane; -1: the newest.
  __device__ __forceinline__ int PageIds(const PieceWords& piece, int round) const {
    const int survivors = CeilSlots(piece.Get(kNumSurvivors));
    const int ring = CeilSlots(piece.Get(kNumRing));
    const int span = piece.Get(kSpan);
    const int in_piece = (round + lane_) * kDecodeWarps + warp_;
    const int i = piece.Get(kFirstPage) + in_piece;
    if (in_piece >= piece.Get(kNumPages) || i >= survivors + ring) return -1;
    return i < survivors
               ? args_.survivor_pages[static_cast<int64_t>(span) * args_.max_survivor_pages + i]
               : args_.ring_pages[static_cast<int64_t>(span) * args_.ring_pages_per_span + i -
                                  survivors];
  }

  // The warp's page `round` of a piece, whose id is `id`.
  __device__ __forceinline__ DecodePage Locate(const PieceWords& piece, int round, int id) const {
    const int num_survivors = piece.Get(kNumSurvivors), num_ring = piece.Get(kNumRing);
    const int span = piece.Get(kSpan), first = piece.Get(kFirstPage);
    if (round >= NumRounds(piece.Get(kNumPages))) return {};
    if (id < 0) return {args_.newest + span * args_.newest_stride, 1, 1};
    const int i = first + round * kDecodeWarps + warp_;
    const int survivors = CeilSlots(num_survivors);
    const int left =
        i < survivors ? num_survivors - i * S::kSlots : num_ring - (i - survivors) * S::kSlots;
    return {args_.pages + static_cast<int64_t>(id) * S::kPageBytes, S::kSlots,
            left < S::kSlots ? left : S::kSlots};
  }

  __device__ __forceinline__ void IssueK(const DecodePage& page) {
    const uint8_t* k = page.base + (r_ * S::kRowBytes + c_ * 16);
    const int left = page.count - r_;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = t * 16 + half * 8;
#pragma unroll
        for (int i = 0; i < S::kKVecs; ++i) {
          LoadStream<4>(k + (key * S::kRowBytes + i * 64), key < left, policy_, k_[t][half][i]);
        }
      }
    }
    if constexpr (S::kScaled) LoadScales(page, 0, k_scale_);
    k_count_ = page.count;
  }

  __device__ __forceinline__ void IssueV(const DecodePage& page) {
    constexpr int kVecBytes = S::kVWords == 2 ? 8 : 16;
    const uint8_t* v =
        page.base + (page.slots * S::kRowBytes + 2 * c_ * S::kRowBytes + r_ * kVecBytes);
    const int left = page.count - 2 * c_;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = t * 16 + (i / 2) * 8 + i % 2;
        if constexpr (S::kVWords == 2) {
          LoadStream<2>(v + key * S::kRowBytes, key < left, policy_, v_[t][i]);
        } else {
#pragma unroll
          for (int u = 0; u < S::kVWords / 4; ++u) {
            LoadStream<4>(v + (key * S::kRowBytes + u * 128), key < left, policy_,
                          &v_[t][i][u * 4]);
          }
        }
      }
    }
    if constexpr (S::kScaled) LoadScales(page, 1, v_scale_);
  }

  // A new piece: nothing seen yet.
  __device__ __forceinline__ void Reset() {
    max_ = -INFINITY;
    sum_ = 0.0f;
    exponent_ = -14;
#pragma unroll
    for (int j = 0; j < S::kOutTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[j][i] = 0.0f;
    }
  }

  // Writes this warp's share of the queries' fragments; the factor of this lane's head goes
  // to q_scale_.
  __device__ __forceinline__ void PrepareQuery(int row, uint4 (*fragments)[32]) {
    float4 x[S::kSteps];
    const float* q = args_.q + (static_cast<int64_t>(row) * args_.group + r_) * kDim;
    int amax = 0;
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      x[s] = r_ < args_.group ? *reinterpret_cast<const float4*>(q + S::QChannel(s, c_))
                              : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      const float larger =
          fmaxf(fmaxf(fabsf(x[s].x), fabsf(x[s].y)), fmaxf(fabsf(x[s].z), fabsf(x[s].w)));
      amax = max(amax, __float_as_int(larger));
    }
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
    // Scaled by a power of two to at most 2^8, so that float16 holds it.
    const int exponent = min(max(261 - (amax >> 23), 1), 253);
    const float factor = __int_as_float(exponent << 23);
    q_scale_ = args_.scale_log2 * __int_as_float((254 - exponent) << 23);
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      if (s % kDecodeWarps != warp_) continue;
      SplitPair a, b;
      if constexpr (S::kScaled) {
        a = SplitF16(x[s].x * factor, x[s].y * factor);
        b = SplitF16(x[s].z * factor, x[s].w * factor);
      } else {
        a = SplitBf16(x[s].x * factor, x[s].y * factor);
        b = SplitBf16(x[s].z * factor, x[s].w * factor);
      }
      fragments[s][lane_] = make_uint4(a.hi, a.lo, b.hi, b.lo);
    }
  }

  // Scores of the page whose K was issued; they and its V's factors become probabilities.
  __device__ __forceinline__ void Scores(const uint4 (*fragments)[32]) {
    float acc[S::kTiles][2][4] = {};
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      const uint4 a = fragments[s][lane_];
#pragma unroll
      for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if constexpr (S::kScaled) {
            const uint32_t w = k_[t][half][s / 4][s % 4];
            MmaF16(acc[t][half], a, ToOperand<kK, 0>(w), ToOperand<kK, 1>(w));
          } else {
            MmaBf16(acc[t][half], a, k_[t][half][s / 2][(s % 2) * 2],
                    k_[t][half][s / 2][(s % 2) * 2 + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 scale = make_float2(1.0f, 1.0f);
        if constexpr (S::kScaled) scale = HalfPair(k_scale_[t][half]);
        const int key = t * 16 + half * 8 + 2 * c_;
        const float(&x)[4] = acc[t][half];
        p_[t][half][0] = key < k_count_ ? (x[0] + x[2]) * q_scale_ * scale.x : -INFINITY;
        p_[t][half][1] = key + 1 < k_count_ ? (x[1] + x[3]) * q_scale_ * scale.y : -INFINITY;
      }
    }
  }

  // Adds the page whose V was issued.
  __device__ __forceinline__ void Accumulate() {
    float page_max = p_[0][0][0];
    uint32_t v_max = 0;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        page_max = fmaxf(page_max, fmaxf(p_[t][half][0], p_[t][half][1]));
        if constexpr (S::kScaled) v_max = __vmaxu2(v_max, v_scale_[t][half]);
      }
    }
    page_max = fmaxf(page_max, __shfl_xor_sync(0xffffffffu, page_max, 1));
    page_max = fmaxf(page_max, __shfl_xor_sync(0xffffffffu, page_max, 2));
    const float new_max = fmaxf(max_, page_max);
    const float decay = Exp2(max_ - new_max);
    max_ = new_max;
    float out_decay = decay, v_factor = 1.0f;
    if constexpr (S::kScaled) {
      // A power of two brings the page's factors of V to at most 2, and p times them, with
      // 2^8 more, into float16's range.
      v_max = max(v_max & 0xffffu, v_max >> 16);
      v_max = max(v_max, __shfl_xor_sync(0xffffffffu, v_max, 1));
      v_max = max(v_max, __shfl_xor_sync(0xffffffffu, v_max, 2));
      const int exponent = max(exponent_, static_cast<int>(v_max >> 10) - 15);
      out_decay *= PowerOfTwo(exponent_ - exponent);
      exponent_ = exponent;
      v_factor = PowerOfTwo(kProductShift - exponent);
    }
    sum_ *= decay;
#pragma unroll
    for (int j = 0; j < S::kOutTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[j][i] *= out_decay;
    }
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
      SplitPair p[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float p0 = Exp2(p_[t][half][0] - new_max), p1 = Exp2(p_[t][half][1] - new_max);
        sum_ += p0 + p1;
        if constexpr (S::kScaled) {
          const float2 scale = HalfPair(v_scale_[t][half]);
          p[half] = SplitF16(p0 * (scale.x * v_factor), p1 * (scale.y * v_factor));
        } else {
          p[half] = SplitBf16(p0, p1);
        }
      }
      const uint4 a = make_uint4(p[0].hi, p[0].lo, p[1].hi, p[1].lo);
#pragma unroll
      for (int w = 0; w < S::kVWords; ++w) {
        // Bytes (or halves) of two keys side by side: first the lower channels', then the upper.
        const uint32_t lower_sel = S::kScaled ? 0x5140 : 0x5410;
        const uint32_t upper_sel = S::kScaled ? 0x7362 : 0x7632;
        const uint32_t a0 = __byte_perm(v_[t][0][w], v_[t][1][w], lower_sel);
        const uint32_t a1 = __byte_perm(v_[t][0][w], v_[t][1][w], upper_sel);
        const uint32_t b0 = __byte_perm(v_[t][2][w], v_[t][3][w], lower_sel);
        const uint32_t b1 = __byte_perm(v_[t][2][w], v_[t][3][w], upper_sel);
        if constexpr (S::kScaled) {
          MmaF16(out_[4 * w], a, ToOperand<kV, 0>(a0), ToOperand<kV, 0>(b0));
          MmaF16(out_[4 * w + 1], a, ToOperand<kV, 1>(a0), ToOperand<kV, 1>(b0));
          MmaF16(out_[4 * w + 2], a, ToOperand<kV, 0>(a1), ToOperand<kV, 0>(b1));
          MmaF16(out_[4 * w + 3], a, ToOperand<kV, 1>(a1), ToOperand<kV, 1>(b1));
        } else {
          MmaBf16(out_[2 * w], a, a0, b0);
          MmaBf16(out_[2 * w + 1], a, a1, b1);
        }
      }
    }
  }

  // This warp's maximum and sum of its lane's head.
  __device__ __forceinline__ float Max() const { return max_; }
  __device__ __forceinline__ float Sum() const {
    float sum = sum_ + __shfl_xor_sync(0xffffffffu, sum_, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
  }
  // Calls put(channel, value) for this lane's channels, relative to the maximum `max`.
  template <typename Put>
  __device__ __forceinline__ void Output(float max, Put put) const {
    float factor = Exp2(max_ - max);
    if constexpr (S::kScaled) factor *= PowerOfTwo(exponent_ - kProductShift);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < S::kOutTiles; j += 4) {
        const auto value = [&](int i) { return (out_[j + i][n] + out_[j + i][n + 2]) * factor; };
        put(S::VChannel(2 * c_ + n, j), make_float4(value(0), value(1), value(2), value(3)));
      }
    }
  }

 private:
  static constexpr int kProductShift = 8;

  static __device__ __forceinline__ int CeilSlots(int n) { return (n + S::kSlots - 1) / S::kSlots; }
  static __device__ __forceinline__ float2 HalfPair(uint32_t w) {
    __half2 h;
    memcpy(&h, &w, 4);
    return __half22float2(h);
  }

  // Scales of K (part 0) or V (part 1) of keys 2c and 2c + 1 of each 8. A flat row's two lie
  // in one word.
  __device__ __forceinline__ void LoadScales(const DecodePage& page, int part,
                                             uint32_t (&out)[S::kTiles][2]) const {
    const uint8_t* scales = page.base + page.slots * (2 * S::kRowBytes);
    if (page.slots != 1) scales += part * S::kSlots * 2;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = t * 16 + half * 8 + 2 * c_;
        uint32_t w = 0;
        if (key < page.count) w = __ldg(reinterpret_cast<const uint32_t*>(scales + key * 2));
        if (page.slots == 1 && part == 1) w >>= 16;
        if (key + 1 >= page.count) w &= 0xffffu;
        out[t][half] = w;
      }
    }
  }

  const CompactDecodeArgs& args_;
  const int warp_, lane_, r_, c_;
  const uint64_t policy_;
  uint32_t k_[S::kTiles][2][S::kKVecs][4];
  uint32_t v_[S::kTiles][4][S::kVWords];
  uint32_t k_scale_[S::kTiles][2], v_scale_[S::kTiles][2];
  int k_count_ = 0;
  float q_scale_ = 0.0f;
  float p_[S::kTiles][2][2];  // scores, in units of log2
  float max_, sum_;
  int exponent_;
  float out_[S::kOutTiles][4];
};

// Rotates a head's channels, 4 a lane of kDim / 4 neighbours, as HadamardRotate() does.
template <int kDim>
__device__ __forceinline__ float4 HadamardLanes(float4 x, int lane) {
  const float scale = kDim == 128 ? 0.08838834764831845f : 0.125f;
  x = make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
  x = make_float4(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
  x = make_float4(x.x + x.z, x.y + x.w, x.x - x.z, x.y - x.w);
#pragma unroll
  for (int half = 1; half < kDim / 4; half *= 2) {
    const auto step = [&](float own) {
      const float other = __shfl_xor_sync(0xffffffffu, own, half);
      return (lane & half) != 0 ? other - own : own + other;
    };
    x = make_float4(step(x.x), step(x.y), step(x.z), step(x.w));
  }
  return x;
}

template <int kDim>
__device__ __forceinline__ void StoreOutput(const CompactDecodeArgs& args, int row, int head,
                                            int channel, float4 x) {
  const int64_t at = (static_cast<int64_t>(row) * args.group + head) * kDim + channel;
  if (args.out_f32 != nullptr) {
    *reinterpret_cast<float4*>(args.out_f32 + at) = x;
  } else {
    const __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(x.x, x.y),
                                    __floats2bfloat162_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(args.out_bf16 + at) = *reinterpret_cast<const uint2*>(pair);
  }
}

template <KvElement kK, KvElement kV, int kDim>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    CompactDecodeKernel(const __grid_constant__ CompactDecodeArgs args) {
  using S = DecodeShape<kK, kV, kDim>;
  constexpr int kLanesPerHead = kDim / 4;
  // 4 floats after each quarter of a head, so that the lanes' 16-byte stores meet few banks.
  constexpr int kHeadFloats = kDim + 16;
  const auto padded = [](int channel) { return channel + channel / (kDim / 4) * 4; };
  __shared__ uint4 fragments[S::kSteps][32];
  __shared__ float warp_max[kDecodeWarps][kMaxDecodeGroup], warp_sum[kDecodeWarps][kMaxDecodeGroup];
  __shared__ __align__(16) float warp_out[kDecodeWarps][kMaxDecodeGroup][kHeadFloats];
  __shared__ float weights[kMaxDecodeGroup][kMaxPieces];
  __shared__ float total[kMaxDecodeGroup];
  __shared__ int following, is_last;

  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / 32, lane = tid % 32;
  const int group = args.group;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int num_pieces = *args.num_pieces;
  const int grid = static_cast<int>(gridDim.x);
  int at = static_cast<int>(blockIdx.x), next_at = at + grid;
  // No pages past the last piece. Loads before the number of pieces is there.
  const auto load_piece = [&](int i) {
    PieceWords piece;
    if (i < args.max_pieces && lane < 16) {
      piece.word = reinterpret_cast<const int*>(args.pieces + i)[lane];
    }
    if (i >= num_pieces) piece.word = 0;
    return piece;
  };
  DecodeWarp<kK, kV, kDim> state(args, warp, lane);
  PieceWords piece = load_piece(at), next_piece = load_piece(next_at);
  if (at < num_pieces) {
    const DecodePage page = state.Locate(piece, 0, piece.Get(kPage0 + warp));
    state.IssueK(page);
    state.IssueV(page);
  }
  while (at < num_pieces) {
    int following_at = num_pieces;
    if (tid == 0 && next_at < num_pieces) following_at = 2 * grid + atomicAdd(args.next_piece, 1);
    const int row = piece.Get(kRow);
    state.PrepareQuery(row, fragments);
    const int rounds = state.NumRounds(piece.Get(kNumPages));
    int ids = 0;
    if (rounds > 1) ids = state.PageIds(piece, 0);
    __syncthreads();  // fragments written

    state.Reset();
    // The first page after this piece's, if any.
    const DecodePage next_first = state.Locate(next_piece, 0, next_piece.Get(kPage0 + warp));
    for (int round = 0; round < rounds; ++round) {
      DecodePage next = next_first;
      if (round + 1 < rounds) {
        if ((round + 1) % 32 == 0) ids = state.PageIds(piece, round + 1);
        next = state.Locate(piece, round + 1, __shfl_sync(0xffffffffu, ids, (round + 1) % 32));
      }
      state.Scores(fragments);
      state.IssueK(next);
      state.Accumulate();
      state.IssueV(next);
    }
    if (rounds == 0) {
      state.IssueK(next_first);
      state.IssueV(next_first);
    }

    const float sum = state.Sum();
    if (lane % 4 == 0) {
      warp_max[warp][lane / 4] = state.Max();
      warp_sum[warp][lane / 4] = sum;
    }
    if (tid == 0) following = following_at;
    __syncthreads();  // maxima written, fragments read
    {
      const int head = lane / 4;
      const float max = fmaxf(fmaxf(warp_max[0][head], warp_max[1][head]),
                              fmaxf(warp_max[2][head], warp_max[3][head]));
      if (head < group) {
        state.Output(max, [&](int channel, float4 x) {
          *reinterpret_cast<float4*>(&warp_out[warp][head][padded(channel)]) = x;
        });
      }
    }
    const int after_next = following;
    __syncthreads();  // outputs written, `following` read

    const int pieces_of_span = piece.Get(kNumPieces), index = piece.Get(kPiece);
    const int64_t partial = piece.Get(kPartial);
    const int pages_of_piece = piece.Get(kNumPages);
    const int tasks = group * kLanesPerHead;
    for (int base = 0; base < tasks; base += kDecodeThreads) {
      const int task = base + tid;
      const int head = min(task / kLanesPerHead, group - 1);
      const int channel = task % kLanesPerHead * 4;
      const float max = fmaxf(fmaxf(warp_max[0][head], warp_max[1][head]),
                              fmaxf(warp_max[2][head], warp_max[3][head]));
      float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      float norm = 0.0f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        if (w >= pages_of_piece) continue;  // took no page
        const float4 y = *reinterpret_cast<const float4*>(&warp_out[w][head][padded(channel)]);
        x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
        norm += Exp2(warp_max[w][head] - max) * warp_sum[w][head];
      }
      if (pieces_of_span == 1) {
        x = make_float4(x.x / norm, x.y / norm, x.z / norm, x.w / norm);
        if (args.rotated) x = HadamardLanes<kDim>(x, lane);
        if (task < tasks) StoreOutput<kDim>(args, row, head, channel, x);
      } else if (task < tasks) {
        const int64_t out = (partial + index) * group + head;
        __stcg(reinterpret_cast<float4*>(args.partial_out + out * kDim + channel), x);
        if (channel == 0) {
          __stcg(reinterpret_cast<float2*>(args.partial_norm + out * 2), make_float2(max, norm));
        }
      }
    }
    if (pieces_of_span > 1) {
      __syncthreads();  // the block's partial result is out
      if (tid == 0) {
        __threadfence();
        is_last = atomicAdd(&args.arrivals[row], 1) == pieces_of_span - 1 ? 1 : 0;
        if (is_last != 0) args.arrivals[row] = 0;
        __threadfence();
      }
      __syncthreads();
      if (is_last != 0) {
        // The first pieces' results are on their way while the weights are computed.
        constexpr int kAhead = 8;
        const float* first_in = args.partial_out +
                                (partial * group + min(tid / kLanesPerHead, group - 1)) * kDim +
                                tid % kLanesPerHead * 4;
        float4 ahead[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
          const int64_t offset = static_cast<int64_t>(min(p, pieces_of_span - 1)) * group * kDim;
          ahead[p] = __ldcg(reinterpret_cast<const float4*>(first_in + offset));
        }
        for (int head = warp; head < group; head += kDecodeWarps) {
          float2 part[kMaxPieces / 32];
          float max = -INFINITY;
#pragma unroll
          for (int i = 0; i < kMaxPieces / 32; ++i) {
            const int p = lane + 32 * i;
            part[i] = make_float2(-INFINITY, 0.0f);
            if (p < pieces_of_span) {
              part[i] = __ldcg(reinterpret_cast<const float2*>(args.partial_norm +
                                                               ((partial + p) * group + head) * 2));
            }
            max = fmaxf(max, part[i].x);
          }
#pragma unroll
          for (int offset = 16; offset > 0; offset /= 2) {
            max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, offset));
          }
          float sum = 0.0f;  // the same tree for every span
#pragma unroll
          for (int i = 0; i < kMaxPieces / 32; ++i) {
            const float weight = lane + 32 * i < pieces_of_span ? Exp2(part[i].x - max) : 0.0f;
            weights[head][lane + 32 * i] = weight;
            sum += weight * part[i].y;
          }
#pragma unroll
          for (int offset = 16; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
          }
          if (lane == 0) total[head] = sum;
        }
        __syncthreads();
        for (int base = 0; base < tasks; base += kDecodeThreads) {
          const int task = base + tid;
          const int head = min(task / kLanesPerHead, group - 1);
          const int channel = task % kLanesPerHead * 4;
          const float* in = args.partial_out + (partial * group + head) * kDim + channel;
          float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          const auto add = [&](int p, float4 y) {
            const float w = weights[head][p];
            x = make_float4(x.x + w * y.x, x.y + w * y.y, x.z + w * y.z, x.w + w * y.w);
          };
          const auto load = [&](int p) {
            return __ldcg(
                reinterpret_cast<const float4*>(in + static_cast<int64_t>(p) * group * kDim));
          };
#pragma unroll
          for (int p = 0; p < kAhead; ++p) {
            if (p < pieces_of_span) add(p, base == 0 ? ahead[p] : load(p));
          }
#pragma unroll 8
          for (int p = kAhead; p < pieces_of_span; ++p) add(p, load(p));
          const float norm = total[head];
          x = make_float4(x.x / norm, x.y / norm, x.z / norm, x.w / norm);
          if (args.rotated) x = HadamardLanes<kDim>(x, lane);
          if (task < tasks) StoreOutput<kDim>(args, row, head, channel, x);
        }
        __syncthreads();  // weights read
      }
    }
    piece = next_piece;
    at = next_at;
    next_at = after_next;
    next_piece = load_piece(next_at);
  }
  // The last block to end leaves the counters as it found them.
  if (tid == 0 && atomicAdd(args.next_piece + 1, 1) == grid - 1) {
    args.next_piece[0] = 0;
    args.next_piece[1] = 0;
  }
}

template <KvElement kK, KvElement kV, int kDim>
cudaError_t LaunchCompactDecode(const CompactDecodeArgs& args, int grid, bool overlap,
                                cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kDecodeThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, CompactDecodeKernel<kK, kV, kDim>, args);
}

}  // namespace winnow::kernels::device
