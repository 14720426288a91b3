#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/compact_decode_ring.cuh"
#include "kernels/cuda/mma_sync.cuh"

// A warp's running attention over pages in shared memory. Keys and channels are the 16 rows
// of m16n8k16, heads its 8 columns, so K and V (transposed) are the left factors and both
// products leave keys or channels in rows. Queries and probabilities enter as a high and a
// low 16-bit float:
//   kHeads 4: column 2h is the high part of head h, column 2h + 1 its low part
//   kHeads 8: column h is head h, and a product is done once for each part
// Lane l: r = l / 4 is its row of 8 (and its column of a right factor), c = l % 4 the pair of
// columns of a result that it holds.
namespace winnow::kernels::device {

// A head's queries as right factors: of step s, 16 channels, lane l's registers.
template <int kHeads>
struct QueryWords;
template <>
struct QueryWords<4> {
  using Type = uint2;
};
template <>
struct QueryWords<8> {
  using Type = uint4;  // high parts, then low
};

template <KvElement kE, int kHalf>
__device__ __forceinline__ uint32_t ToOperand(uint32_t w) {
  if constexpr (kE == KvElement::kE4m3) return E4m3PairToF16<kHalf>(w);
  return Int8PairToF16<kHalf>(w);
}

__device__ __forceinline__ float PowerOfTwo(int exponent) {
  return __int_as_float((127 + exponent) << 23);
}

__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t w) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(w));
  return out;
}
template <int kWords>
__device__ __forceinline__ void LoadShared(uint32_t address, uint32_t* out) {
  if constexpr (kWords == 4) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  }
}

template <KvElement kK, KvElement kV, int kDim, int kHeads>
class DecodeWarp {
 public:
  using S = DecodeShape<kK, kV, kDim>;
  using Words = typename QueryWords<kHeads>::Type;
  // Pages that may be added at once, so that one's work fills the other's waits. Of 128 channels
  // two would take too much of the ring.
  static constexpr int kPages = kHeads == 4 && kDim == 64 ? 2 : 1;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kOutTiles = kDim / 16;
  static constexpr int kVWords = S::kRowBytes / 32;  // a lane of a V row
  static constexpr int kCols = kHeads / 4;           // heads a lane of a result
  static constexpr int kProductShift = 8;
  static constexpr float kNoMaximum = -3e38f;  // infinities would leave NaNs where no key is live

  // The first of the channels that lane column c holds of step s: four neighbours with
  // 8-bit codes, else two here and two 8 further on.
  static __device__ __forceinline__ int QChannel(int s, int c) {
    return s * 16 + c * (S::kBytes == 1 ? 4 : 2);
  }
  // The channel of the j-th of lane row r's kDim / 8.
  static __device__ __forceinline__ int VChannel(int r, int j) {
    return S::kBytes == 1 ? r * (kDim / 8) + j : (j / 8) * 64 + r * 8 + j % 8;
  }

  __device__ __forceinline__ explicit DecodeWarp(int lane)
      : r_(lane / 4),
        c_(lane % 4),
        k_offset_(Swizzled(((lane / 8 % 2) * 8 + lane % 8) * S::kRowBytes + lane / 16 * 16)),
        v_offset_(Swizzled(2 * c_ * S::kRowBytes + r_ * (kVWords == 2 ? 8 : 16))) {}

  // A new item: nothing seen yet. `scale` holds the factor of each head's scores.
  __device__ __forceinline__ void Reset(const Words (*query)[32], const float* scale) {
    query_ = query;
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
      q_scale_[i] = scale[c_ * kCols + i];
      max_[i] = kNoMaximum;
      sum_[i] = 0.0f;
    }
    exponent_ = -14;
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[j][i] = 0.0f;
    }
  }

  // A page of which the first `count` keys are live, perhaps none. Its codes start at `codes`
  // (1024-byte aligned), V's scales `v_scales` bytes after K's.
  struct Page {
    uint32_t codes;
    const uint8_t* scales;
    int v_scales, count;
  };

  // Adds pages. Calls done(i) when the last of page i has been read.
  template <int kAtOnce, typename Done>
  __device__ __forceinline__ void AddPages(const Page (&pages)[kAtOnce], Done done) {
    constexpr int kTiles = kAtOnce * S::kTiles;  // of 16 keys
    float p[kTiles][2][kCols];
    uint32_t v_scale[kTiles][2];
    Products(pages, p);
    uint32_t v_max = 0;
    float page_max[kCols];
#pragma unroll
    for (int i = 0; i < kCols; ++i) page_max[i] = -INFINITY;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      Scores(pages[t / S::kTiles], t % S::kTiles, p[t], v_scale[t], page_max, &v_max);
    }
    const float v_factor = MoveMaximum(page_max, v_max);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const Page& page = pages[t / S::kTiles];
      const int tile = t % S::kTiles;
      uint32_t hi[2], lo[2];
      Weights(p[t], v_scale[t], v_factor, hi, lo);
      uint32_t v[4][kVWords];
      LoadValues(page.codes + S::kPartBytes + tile * 16 * S::kRowBytes, page.count - tile * 16, v);
      if (tile == S::kTiles - 1) done(t / S::kTiles);
      AddValues(v, hi, lo);
    }
  }

  // Calls stats(head, maximum, sum) on one lane a head, then put(head, channel, value) for
  // four channels relative to that maximum, on the lanes that hold them.
  template <typename Stats, typename Put>
  __device__ __forceinline__ void Finish(Stats stats, Put put) const {
    const float factor = S::kScaled ? PowerOfTwo(exponent_ - kProductShift) : 1.0f;
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
      float sum = sum_[i];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      }
      if (r_ == 0) stats(c_ * kCols + i, max_[i], sum);
#pragma unroll
      for (int j = 0; j < kDim / 8; j += 4) {
        const auto value = [&](int k) {
          const float* x = &out_[(j + k) / 2][k % 2 * 2];
          return (kHeads == 4 ? x[0] + x[1] : x[i]) * factor;
        };
        put(c_ * kCols + i, VChannel(r_, j), make_float4(value(0), value(1), value(2), value(3)));
      }
    }
  }

 private:
  // Products of the pages' keys and queries: p[t][half][i] is of key 16 t + 8 half + r.
  template <int kAtOnce, int kTiles>
  __device__ __forceinline__ void Products(const Page (&pages)[kAtOnce],
                                           float (&p)[kTiles][2][kCols]) {
    uint4 k[kTiles];
    // Two sums a tile: of alternate steps where tiles are few, or of the high and the low parts.
    float acc[kTiles][2][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const Words b = query_[s][r_ * 4 + c_];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint32_t at = pages[t / S::kTiles].codes + k_offset_;
        const int tile_bytes = t % S::kTiles * 16 * S::kRowBytes;
        uint4 a;
        if constexpr (S::kScaled) {
          // A 16-byte vector of a key is a step: its words are both halves of a row.
          if (s % 2 == 0) k[t] = LoadMatrices((at ^ (s * 16)) + tile_bytes);
          const uint32_t upper = s % 2 == 0 ? k[t].x : k[t].z;
          const uint32_t lower = s % 2 == 0 ? k[t].y : k[t].w;
          a = make_uint4(ToOperand<kK, 0>(upper), ToOperand<kK, 0>(lower), ToOperand<kK, 1>(upper),
                         ToOperand<kK, 1>(lower));
        } else {
          a = LoadMatrices((at ^ Swizzled(s * 32)) + tile_bytes);
        }
        if constexpr (kHeads == 4) {
          Multiply(acc[t][kTiles < 4 ? s % 2 : 0], a, b.x, b.y);
        } else {
          Multiply(acc[t][0], a, b.x, b.y);
          Multiply(acc[t][1], a, b.z, b.w);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x0 = acc[t][0][2 * half] + acc[t][1][2 * half];
        const float x1 = acc[t][0][2 * half + 1] + acc[t][1][2 * half + 1];
        if constexpr (kHeads == 4) {
          p[t][half][0] = x0 + x1;
        } else {
          p[t][half][0] = x0;
          p[t][half][1] = x1;
        }
      }
    }
  }
  // Makes scores of a tile's products, -infinity past the live keys, and finds the largest of them
  // and of V's scales, which it loads as float16.
  __device__ __forceinline__ void Scores(const Page& page, int tile, float (&p)[2][kCols],
                                         uint32_t (&v_scale)[2], float (&page_max)[kCols],
                                         uint32_t* v_max) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = tile * 16 + half * 8 + r_;
      float k_scale = 1.0f;
      v_scale[half] = 0;
      if constexpr (S::kScaled) {
        k_scale = __half2float(*reinterpret_cast<const __half*>(page.scales + 2 * key));
        if (key < page.count) {
          v_scale[half] = *reinterpret_cast<const uint16_t*>(page.scales + page.v_scales + 2 * key);
        }
        *v_max = max(*v_max, v_scale[half]);
      }
#pragma unroll
      for (int i = 0; i < kCols; ++i) {
        const float score = p[half][i] * q_scale_[i] * k_scale;
        p[half][i] = key < page.count ? score : -INFINITY;
        page_max[i] = fmaxf(page_max[i], p[half][i]);
      }
    }
  }

  // Makes sums relative to the maximum with the lanes' page_max. Returns the factor of V's scales.
  __device__ __forceinline__ float MoveMaximum(float (&page_max)[kCols], uint32_t v_max) {
    float decay[kCols];
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        page_max[i] = fmaxf(page_max[i], __shfl_xor_sync(0xffffffffu, page_max[i], lanes));
      }
      const float new_max = fmaxf(max_[i], page_max[i]);
      decay[i] = Exp2(max_[i] - new_max);
      max_[i] = new_max;
      sum_[i] *= decay[i];
    }
    float v_factor = 1.0f;
    if constexpr (S::kScaled) {
      // A power of two brings the page's factors of V to at most 2, and p times them, with
      // 2^8 more, into float16's range.
      v_max = __reduce_max_sync(0xffffffffu, v_max);
      const int exponent = max(exponent_, static_cast<int>(v_max >> 10) - 15);
#pragma unroll
      for (int i = 0; i < kCols; ++i) decay[i] *= PowerOfTwo(exponent_ - exponent);
      exponent_ = exponent;
      v_factor = PowerOfTwo(kProductShift - exponent);
    }
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[j][i] *= decay[i % 2 * (kCols - 1)];
    }
    return v_factor;
  }

  // A tile's probabilities as right factors; for kHeads 4 `hi` holds both parts.
  __device__ __forceinline__ void Weights(const float (&p)[2][kCols], const uint32_t (&v_scale)[2],
                                          float v_factor, uint32_t (&hi)[2], uint32_t (&lo)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float factor = 1.0f;
      if constexpr (S::kScaled) {
        factor = __half2float(__ushort_as_half(static_cast<uint16_t>(v_scale[half])));
        factor *= v_factor;
      }
      float x[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kCols; ++i) {
        const float e = Exp2(p[half][i] - max_[i]);
        sum_[i] += e;
        x[i] = S::kScaled ? e * factor : e;
      }
      if constexpr (kHeads == 4) {
        hi[half] = TransposeMatrix(S::kScaled ? SplitOneF16(x[0]) : SplitOneBf16(x[0]));
      } else {
        const SplitPair split = S::kScaled ? SplitF16(x[0], x[1]) : SplitBf16(x[0], x[1]);
        hi[half] = TransposeMatrix(split.hi);
        lo[half] = TransposeMatrix(split.lo);
      }
    }
  }

  // Adds a tile's values times its probabilities.
  __device__ __forceinline__ void AddValues(const uint32_t (&v)[4][kVWords],
                                            const uint32_t (&hi)[2], const uint32_t (&lo)[2]) {
#pragma unroll
    for (int w = 0; w < kVWords; ++w) {
      // Bytes (or halves) of two keys side by side: first the lower channels', then the upper.
      const uint32_t lower_sel = S::kScaled ? 0x5140 : 0x5410;
      const uint32_t upper_sel = S::kScaled ? 0x7362 : 0x7632;
      const uint32_t a0 = __byte_perm(v[0][w], v[1][w], lower_sel);
      const uint32_t a1 = __byte_perm(v[0][w], v[1][w], upper_sel);
      const uint32_t b0 = __byte_perm(v[2][w], v[3][w], lower_sel);
      const uint32_t b1 = __byte_perm(v[2][w], v[3][w], upper_sel);
      const auto add = [&](int j, const uint4& a) {
        Multiply(out_[j], a, hi[0], hi[1]);
        if constexpr (kHeads == 8) Multiply(out_[j], a, lo[0], lo[1]);
      };
      if constexpr (S::kScaled) {
        add(2 * w, make_uint4(ToOperand<kV, 0>(a0), ToOperand<kV, 1>(a0), ToOperand<kV, 0>(b0),
                              ToOperand<kV, 1>(b0)));
        add(2 * w + 1, make_uint4(ToOperand<kV, 0>(a1), ToOperand<kV, 1>(a1), ToOperand<kV, 0>(b1),
                                  ToOperand<kV, 1>(b1)));
      } else {
        add(w, make_uint4(a0, a1, b0, b1));
      }
    }
  }
  static __device__ __forceinline__ void Multiply(float (&d)[4], const uint4& a, uint32_t b0,
                                                  uint32_t b1) {
    if constexpr (S::kScaled) {
      MmaF16(d, a, b0, b1);
    } else {
      MmaBf16(d, a, b0, b1);
    }
  }

  // This lane's channels of keys 2c, 2c + 1, 2c + 8, 2c + 9 of 16, zeros from key `live` on.
  __device__ __forceinline__ void LoadValues(uint32_t tile, int live, uint32_t (&v)[4][kVWords]) {
    constexpr int kEightKeys = 8 * S::kRowBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t at = (tile + v_offset_) ^ Swizzled(i % 2 * S::kRowBytes);
      if (i / 2 == 1) at = kEightKeys < 1024 ? at ^ Swizzled(kEightKeys) : at + kEightKeys;
      if constexpr (kVWords <= 4) {
        LoadShared<kVWords>(at, v[i]);
      } else {
#pragma unroll
        for (int u = 0; u < kVWords / 4; ++u) {
          LoadShared<4>(at ^ Swizzled(u * 128), &v[i][u * 4]);
        }
      }
    }
    if (live < 16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (2 * c_ + i % 2 + i / 2 * 8 < live) continue;
#pragma unroll
        for (int w = 0; w < kVWords; ++w) v[i][w] = 0;
      }
    }
  }

  const int r_, c_;
  const uint32_t k_offset_, v_offset_;  // of this lane, in K and in V
  const Words (*query_)[32];
  float q_scale_[kCols];
  float max_[kCols], sum_[kCols];
  int exponent_;
  float out_[kOutTiles][4];
};

}  // namespace winnow::kernels::device
