// The arithmetic of both attention ops, once for every instruction set.
//
// Law of order. For a query row: s_j = scale * dot, the dot one fused
// multiply-add chain over head_dim upwards; then the true maximum; then, keys
// upwards, p_j = Exp(s_j - max), denominator += p_j and out[d] = fma(p_j, v[d],
// out[d]); then one division. Lanes run across keys in the first part and across
// head_dim in the second, so nothing depends on the vector's width. A masked
// key has p_j = 0 and adds an exact zero. A rotated format's output is rotated back
// after the division, a row for itself.
#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/attention_core.h"
#include "kernels/cpu/cpu_path.h"
#include "kernels/hadamard.h"

// AVX2 and AVX-512; other x86 hosts take the scalar path.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/vec_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow::kernels::internal {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using kernels::HWY_NAMESPACE::Exp;
using kernels::HWY_NAMESPACE::LoadBf16;

using DF = hn::CappedTag<float, 16>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;

// Vectors of head_dim that the second part keeps in registers.
constexpr int kOutVecs = HWY_MAX_BYTES >= 64 ? 4 : 2;

template <KvElement kElement>
using Code = typename KvElementTraits<kElement>::Code;

// What CodesToFloat() must be multiplied by beside the scale. e4m3 bits moved to
// float16's places are 2^-8 of their value.
template <KvElement kElement>
constexpr float kCodeUnit = kElement == KvElement::kE4m3 ? 256.0f : 1.0f;

// N codes as floats, in units of kCodeUnit.
template <KvElement kElement, class D>
HWY_INLINE hn::Vec<D> CodesToFloat(D d, const Code<kElement>* codes) {
  const hn::Rebind<int8_t, D> d8;
  if constexpr (kElement == KvElement::kBf16) {
    return LoadBf16(d, reinterpret_cast<const Bf16*>(codes));
  } else if constexpr (kElement == KvElement::kInt8) {
    return hn::ConvertTo(d, hn::PromoteTo(hn::RebindToSigned<D>(), hn::LoadU(d8, codes)));
  } else {
    const hn::Rebind<int16_t, D> d16;
    const hn::Rebind<hwy::float16_t, D> dh;
    const auto wide = hn::PromoteTo(d16, hn::LoadU(d8, reinterpret_cast<const int8_t*>(codes)));
    const auto half = hn::And(hn::ShiftLeft<7>(wide), hn::Set(d16, static_cast<int16_t>(0xbfff)));
    return hn::PromoteTo(d, hn::BitCast(dh, half));
  }
}

// Transposes squares of kSide x kSide elements, kSide elements being 16 bytes: the
// kBytes at offset of kSide rows in[r] are kBytes / 16 squares side by side.
// out[c * kBytes / sizeof(T) + square * kSide + r] = in[r][square * kSide + c].
// log2(kSide) perfect shuffles of the rows transpose.
template <typename T, size_t kBytes>
HWY_INLINE void TransposeSquares(const uint8_t* const* in, size_t offset, T* out) {
  constexpr size_t kSide = 16 / sizeof(T);
  constexpr size_t kWidth = kBytes / sizeof(T);
#if HWY_TARGET == HWY_SCALAR
  for (size_t i = 0; i < kWidth; ++i) {
    for (size_t r = 0; r < kSide; ++r) {
      std::memcpy(out + i % kSide * kWidth + i / kSide * kSide + r, in[r] + offset + i * sizeof(T),
                  sizeof(T));
    }
  }
#else
  const hn::FixedTag<T, kWidth> d;
  hn::Vec<decltype(d)> a[kSide], b[kSide];
  for (size_t i = 0; i < kSide; ++i) {
    a[i] = hn::LoadU(d, reinterpret_cast<const T*>(in[i] + offset));
  }
  for (size_t round = 1; round < kSide; round *= 2) {
    for (size_t i = 0; i < kSide / 2; ++i) {
      b[2 * i] = hn::InterleaveLower(d, a[i], a[i + kSide / 2]);
      b[2 * i + 1] = hn::InterleaveUpper(d, a[i], a[i + kSide / 2]);
    }
    for (size_t i = 0; i < kSide; ++i) a[i] = b[i];
  }
  for (size_t i = 0; i < kSide; ++i) hn::StoreU(a[i], d, out + i * kWidth);
#endif
}

// unit * scale of a block's tokens. Exact.
void LoadScales(const KeyBlock& block, float unit, float* scales) {
  const DF d;
  const hn::Rebind<uint16_t, DF> d16;
  const hn::Rebind<hwy::float16_t, DF> dh;
  for (int i = 0; i < kBlockKeys; i += static_cast<int>(hn::Lanes(d))) {
    const VF scale = hn::PromoteTo(d, hn::BitCast(dh, hn::LoadU(d16, block.scale + i)));
    hn::Store(hn::Mul(scale, hn::Set(d, unit)), d, scales + i);
  }
}

// K of a block as floats, transposed: kt [head_dim][kBlockKeys]. Takes kBytes of
// a row at a time.
template <KvElement kElement, size_t kBytes>
void LoadKeyBytes(const KeyBlock& block, int head_dim, float* kt) {
  using T = Code<kElement>;
  constexpr int kSide = 16 / sizeof(T);
  constexpr int kWidth = kBytes / sizeof(T);
  const hn::CappedTag<float, kSide> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  [[maybe_unused]] alignas(64) float scales[kBlockKeys];
  if constexpr (KvScaleBytes(kElement) > 0) LoadScales(block, kCodeUnit<kElement>, scales);
  alignas(64) T squares[kSide * kWidth];
  for (int i = 0; i < kBlockKeys; i += kSide) {
    for (int at = 0; at < head_dim; at += kWidth) {
      TransposeSquares<T, kBytes>(block.element + i, static_cast<size_t>(at) * sizeof(T), squares);
      for (int c = 0; c < kWidth; ++c) {
        const T* from = squares + c % kSide * kWidth + c / kSide * kSide;
        float* to = kt + (at + c) * kBlockKeys + i;
        for (int j = 0; j < kSide; j += lanes) {
          auto key = CodesToFloat<kElement>(d, from + j);
          if constexpr (KvScaleBytes(kElement) > 0) key = hn::Mul(key, hn::Load(d, scales + i + j));
          hn::Store(key, d, to + j);
        }
      }
    }
  }
}

template <KvElement kElement>
void LoadKeys(const KeyBlock& block, int head_dim, float* kt) {
  const size_t row_bytes = static_cast<size_t>(head_dim) * KvElementBytes(kElement);
  if constexpr (HWY_MAX_BYTES >= 64) {
    if (row_bytes % 64 == 0) return LoadKeyBytes<kElement, 64>(block, head_dim, kt);
  }
  if constexpr (HWY_MAX_BYTES >= 32) {
    if (row_bytes % 32 == 0) return LoadKeyBytes<kElement, 32>(block, head_dim, kt);
  }
  LoadKeyBytes<kElement, 16>(block, head_dim, kt);
}

// V of a block as floats, vb [count][head_dim].
template <KvElement kElement>
void LoadValues(const KeyBlock& block, int head_dim, float* vb) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  [[maybe_unused]] alignas(64) float scales[kBlockKeys];
  if constexpr (KvScaleBytes(kElement) > 0) LoadScales(block, kCodeUnit<kElement>, scales);
  for (int i = 0; i < block.count; ++i) {
    const auto* row = reinterpret_cast<const Code<kElement>*>(block.element[i]);
    float* out = vb + i * head_dim;
    for (int at = 0; at < head_dim; at += lanes) {
      VF value = CodesToFloat<kElement>(d, row + at);
      if constexpr (KvScaleBytes(kElement) > 0) value = hn::Mul(value, hn::Set(d, scales[i]));
      hn::Store(value, d, out + at);
    }
  }
}

using LoadBlock = void (*)(const KeyBlock& block, int head_dim, float* out);

// One function for each element, in the order of KvElement.
constexpr LoadBlock kLoadKeys[] = {LoadKeys<KvElement::kBf16>, LoadKeys<KvElement::kE4m3>,
                                   LoadKeys<KvElement::kInt8>};
constexpr LoadBlock kLoadValues[] = {LoadValues<KvElement::kBf16>, LoadValues<KvElement::kE4m3>,
                                     LoadValues<KvElement::kInt8>};

// Scores of kRows query rows over a block: s[r * stride + i] = scale * dot.
template <int kRows>
void ScoreRows(const float* kt, const float* q, int head_dim, float scale, float* s,
               int64_t stride) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const VF vscale = hn::Set(d, scale);
  for (int i = 0; i < kBlockKeys; i += 2 * lanes) {
    VF acc[kRows][2];
    for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = hn::Zero(d);
    for (int at = 0; at < head_dim; ++at) {
      const VF k0 = hn::Load(d, kt + at * kBlockKeys + i);
      const VF k1 = hn::Load(d, kt + at * kBlockKeys + i + lanes);
      for (int r = 0; r < kRows; ++r) {
        const VF x = hn::Set(d, q[r * head_dim + at]);
        acc[r][0] = hn::MulAdd(x, k0, acc[r][0]);
        acc[r][1] = hn::MulAdd(x, k1, acc[r][1]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      hn::Store(hn::Mul(acc[r][0], vscale), d, s + r * stride + i);
      hn::Store(hn::Mul(acc[r][1], vscale), d, s + r * stride + i + lanes);
    }
  }
}

// Sets the scores of keys that the query at `pos` does not see to -infinity.
void MaskRow(const KeyBlock& block, int32_t pos, float* s) {
  const DF d;
  const DI di;
  const auto p = hn::Set(di, pos);
  const VF lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int i = 0; i < kBlockKeys; i += static_cast<int>(hn::Lanes(d))) {
    const auto from = hn::LoadU(di, block.pos + i);
    const auto until = hn::LoadU(di, block.limit + i);
    const auto hidden = hn::Or(hn::Gt(from, p), hn::Not(hn::Gt(until, p)));
    const VF masked = hn::IfThenElse(hn::RebindMask(d, hidden), lowest, hn::Load(d, s + i));
    hn::Store(masked, d, s + i);
  }
}

// kRows rows over a block of values: weights p [kRows][kBlockKeys]. With `kSum`
// also the weights' own sums, in every lane: the additions run beside the
// multiply-adds, where a scalar chain of its own took an eighth of the time.
template <int kRows, int kVecs, bool kSum>
void AccumulateVecs(const float* p, const float* vb, int count, int head_dim, float* denominator,
                    float* out) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  VF acc[kRows][kVecs], sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    sum[r] = hn::Set(d, denominator[r]);
    for (int v = 0; v < kVecs; ++v) acc[r][v] = hn::Load(d, out + r * head_dim + v * lanes);
  }
  for (int i = 0; i < count; ++i) {
    VF value[kVecs];
    for (int v = 0; v < kVecs; ++v) value[v] = hn::Load(d, vb + i * head_dim + v * lanes);
    for (int r = 0; r < kRows; ++r) {
      const VF weight = hn::Set(d, p[r * kBlockKeys + i]);
      if (kSum) sum[r] = hn::Add(sum[r], weight);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = hn::MulAdd(weight, value[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (kSum) denominator[r] = hn::GetLane(sum[r]);
    for (int v = 0; v < kVecs; ++v) hn::Store(acc[r][v], d, out + r * head_dim + v * lanes);
  }
}

template <int kRows>
void AccumulateRows(const float* vb, int count, int head_dim, const float* s, int64_t stride,
                    const float* max, float* denominator, float* out) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  alignas(64) float p[kRows * kBlockKeys];
  for (int r = 0; r < kRows; ++r) {
    const VF m = hn::Set(d, max[r]);
    for (int i = 0; i < kBlockKeys; i += lanes) {
      hn::Store(Exp(d, hn::Sub(hn::Load(d, s + r * stride + i), m)), d, p + r * kBlockKeys + i);
    }
  }
  if (head_dim >= kOutVecs * lanes) {
    AccumulateVecs<kRows, kOutVecs, true>(p, vb, count, head_dim, denominator, out);
    int at = kOutVecs * lanes;
    for (; at + kOutVecs * lanes <= head_dim; at += kOutVecs * lanes) {
      AccumulateVecs<kRows, kOutVecs, false>(p, vb + at, count, head_dim, denominator, out + at);
    }
    for (; at < head_dim; at += lanes) {
      AccumulateVecs<kRows, 1, false>(p, vb + at, count, head_dim, denominator, out + at);
    }
    return;
  }
  AccumulateVecs<kRows, 1, true>(p, vb, count, head_dim, denominator, out);
  for (int at = lanes; at < head_dim; at += lanes) {
    AccumulateVecs<kRows, 1, false>(p, vb + at, count, head_dim, denominator, out + at);
  }
}

// fn.template operator()<kRows>(row) over rows [begin, end), four at a time.
template <typename Fn>
HWY_INLINE void ForRowGroups(int begin, int end, const Fn& fn) {
  int row = begin;
  for (; row + 4 <= end; row += 4) fn.template operator()<4>(row);
  switch (end - row) {
    case 3:
      return fn.template operator()<3>(row);
    case 2:
      return fn.template operator()<2>(row);
    case 1:
      return fn.template operator()<1>(row);
    default:
      return;
  }
}

float* Carve(uint8_t** scratch, int64_t floats) {
  float* block = reinterpret_cast<float*>(*scratch);
  *scratch += (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  return block;
}

void RunTile(const AttentionTile& tile) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const int head_dim = tile.source.layout.head_dim;
  const KvFormat& format = KvFormatOf(tile.source.layout.format);
  const int rows = tile.num_queries * tile.group;
  const int last_query = tile.first_query + tile.num_queries - 1;
  const int chunk_keys =
      tile.source.chunk_tokens == 0 ? 0 : last_query - tile.source.span->num_tokens + 1;
  const int64_t stride = (int64_t{tile.source.span->num_live()} + chunk_keys + kBlockKeys - 1) /
                         kBlockKeys * kBlockKeys;
  uint8_t* scratch = tile.scratch;
  float* kt = Carve(&scratch, int64_t{head_dim} * kBlockKeys);  // also V's, in the second part
  float* q = Carve(&scratch, int64_t{rows} * head_dim);
  float* out = Carve(&scratch, int64_t{rows} * head_dim);
  float* max_lanes = Carve(&scratch, int64_t{rows} * lanes);
  float* max = Carve(&scratch, rows);
  float* denominator = Carve(&scratch, rows);
  float* scores = Carve(&scratch, rows * stride);

  const int row_floats = tile.group * head_dim;  // of one query
  for (int i = 0; i < tile.num_queries; ++i) {
    std::memcpy(q + i * row_floats, tile.q + i * tile.query_stride,
                static_cast<size_t>(row_floats) * sizeof(float));
  }
  std::fill(out, out + rows * head_dim, 0.0f);
  std::fill(denominator, denominator + rows, 0.0f);
  std::fill(max_lanes, max_lanes + rows * lanes, -std::numeric_limits<float>::infinity());

  KeyBlock block;
  // Rows of queries before the block's first key see none of it.
  const auto first_row = [&] { return std::max(block.min_pos - tile.first_query, 0) * tile.group; };
  int64_t at = 0;
  for (KeyCursor cursor(tile.source, KvPart::kK, tile.first_query, last_query); cursor.Next(&block);
       at += kBlockKeys) {
    kLoadKeys[static_cast<size_t>(format.k)](block, head_dim, kt);
    ForRowGroups(first_row(), rows, [&]<int kRows>(int row) {
      ScoreRows<kRows>(kt, q + row * head_dim, head_dim, tile.scale, scores + row * stride + at,
                       stride);
    });
    for (int i = first_row() / tile.group; i < tile.num_queries; ++i) {
      const int32_t pos = tile.first_query + i;
      const bool partly = block.count < kBlockKeys || block.max_pos > pos || block.min_limit <= pos;
      for (int row = i * tile.group; row < (i + 1) * tile.group; ++row) {
        float* s = scores + row * stride + at;
        if (partly) MaskRow(block, pos, s);
        VF m = hn::Load(d, max_lanes + row * lanes);
        for (int j = 0; j < kBlockKeys; j += lanes) m = hn::Max(m, hn::Load(d, s + j));
        hn::Store(m, d, max_lanes + row * lanes);
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    max[row] = *std::max_element(max_lanes + row * lanes, max_lanes + (row + 1) * lanes);
  }

  at = 0;
  for (KeyCursor cursor(tile.source, KvPart::kV, tile.first_query, last_query); cursor.Next(&block);
       at += kBlockKeys) {
    kLoadValues[static_cast<size_t>(format.v)](block, head_dim, kt);
    ForRowGroups(first_row(), rows, [&]<int kRows>(int row) {
      AccumulateRows<kRows>(kt, block.count, head_dim, scores + row * stride + at, stride,
                            max + row, denominator + row, out + row * head_dim);
    });
  }

  for (int row = 0; row < rows; ++row) {
    const int64_t to =
        row / tile.group * tile.query_stride + static_cast<int64_t>(row % tile.group) * head_dim;
    const VF sum = hn::Set(d, denominator[row]);
    float* result = out + row * head_dim;
    for (int i = 0; i < head_dim; i += lanes) {
      hn::Store(hn::Div(hn::Load(d, result + i), sum), d, result + i);
    }
    if (format.rotated) HadamardRotate(head_dim, result);
    for (int i = 0; i < head_dim; i += lanes) {
      const VF value = hn::Load(d, result + i);
      if (tile.out_f32 != nullptr) {
        hn::StoreU(value, d, tile.out_f32 + to + i);
      } else {
        kernels::HWY_NAMESPACE::StoreBf16(d, value, tile.out_bf16 + to + i);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow::kernels::internal
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow::kernels::internal {

HWY_EXPORT(RunTile);

void RunAttentionTile(const AttentionTile& tile) {
  ActiveCpuPath();
  HWY_DYNAMIC_DISPATCH(RunTile)(tile);
}

}  // namespace winnow::kernels::internal
#endif
