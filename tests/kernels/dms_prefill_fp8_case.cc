#include "tests/kernels/dms_prefill_fp8_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "kernels/cuda/dms_prefill_fp8_scales.h"

namespace winnow::kernels {
namespace {

// Exact data: scores are -1, 0 or 1 (one channel of q is 1 or -1 and its scale ln 2), the
// scales of K and V powers of two, which a channel of 448 times that gives.
void MakeExact(std::mt19937& rng, Inputs& in) {
  const auto pick = [&](int n) { return static_cast<int>(rng() % static_cast<uint32_t>(n)); };
  in.scale = 0.693147180559945309f;
  for (size_t i = 0; i < in.q.size(); i += kDim) {
    in.q[i + Size(pick(kDim - 1))] = ToBf16(pick(2) == 0 ? 1.0f : -1.0f);
  }
  for (size_t i = 0; i < in.k.size(); i += kDim) {
    const int unit = pick(2);  // of V's codes: 1 or 1/2
    for (size_t d = 0; d + 1 < kDim; ++d) {
      in.k[i + d] = ToBf16(static_cast<float>(pick(3) - 1));
      in.v[i + d] = ToBf16(std::ldexp(static_cast<float>(pick(5) - 2), -unit));
    }
    in.k[i + kDim - 1] = ToBf16(448.0f);
    in.v[i + kDim - 1] = ToBf16(std::ldexp(pick(2) == 0 ? 448.0f : -448.0f, -unit));
  }
}

// |x| <= 448 to the nearest e4m3 number, ties to even.
double RoundE4m3(double x) {
  if (x == 0.0) return 0.0;
  const double step = std::ldexp(1.0, std::max(std::ilogb(x), -6) - 3);
  return std::nearbyint(x / step) * step;
}

// The scale of V of vector i, positive and finite here.
float ValueScale(const Inputs& in, size_t i) {
  uint16_t half;
  std::memcpy(&half, RowToken(KvFormatId::kFp8, kDim, &in.rows[i * kTokenBytes]).v_scale, 2);
  return internal::PrefillFp8Scale(half);
}

}  // namespace

Inputs MakeInputs(const Fp8Case& c, int tokens, Data data, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  const size_t vectors = Size(tokens) * Size(c.kv_heads);
  Inputs in;
  in.tokens = tokens;
  in.q.resize(vectors * Size(c.group) * kDim);
  in.k.resize(vectors * kDim);
  in.v.resize(vectors * kDim);
  if (data == Data::kExact) {
    MakeExact(rng, in);
  } else {
    in.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    const float sigma = data == Data::kNormal ? 1.5f : 6.0f;
    for (Bf16& x : in.q) x = ToBf16(sigma * normal(rng));
    for (Bf16& x : in.k) x = ToBf16(normal(rng));
    for (Bf16& x : in.v) x = ToBf16(normal(rng));
    for (size_t i = 0; i < vectors; i += 7) {  // rows of zeros and of large values
      for (size_t d = 0; d < kDim; ++d) {
        Bf16& x = in.v[i * kDim + d];
        x = i % 5 == 0 ? Bf16{0} : ToBf16(64.0f * ToFloat(x));
      }
    }
  }
  in.decisions.resize(vectors);
  for (size_t i = 0; i < vectors; ++i) {
    const double rate = c.evict_rate <= 0.0 || c.evict_rate >= 1.0
                            ? c.evict_rate
                            : c.evict_rate - 0.05 * static_cast<double>(i % Size(c.kv_heads));
    in.decisions[i] = uniform(rng) < rate ? 1 : 0;
  }
  in.rows.resize(vectors * kTokenBytes);
  in.stored_k.resize(vectors * kDim);
  in.stored_v.resize(vectors * kDim);
  for (size_t i = 0; i < vectors; ++i) {
    float k[kDim], v[kDim];
    for (size_t d = 0; d < kDim; ++d) {
      k[d] = ToFloat(in.k[i * kDim + d]);
      v[d] = ToFloat(in.v[i * kDim + d]);
    }
    StoreRow(KvFormatId::kFp8, kDim, k, v, &in.rows[i * kTokenBytes]);
    const TokenRef token = RowToken(KvFormatId::kFp8, kDim, &in.rows[i * kTokenBytes]);
    LoadK(KvFormatId::kFp8, kDim, token, &in.stored_k[i * kDim]);
    LoadV(KvFormatId::kFp8, kDim, token, &in.stored_v[i * kDim]);
  }
  return in;
}

float LargestValueScale(const Fp8Case& c, const Inputs& in, int prefix, int token, int head) {
  const int band = prefix - std::min(prefix, c.window);
  const int first = token < band ? token / 64 * 64 : band + (token - band) / 64 * 64;
  const int end = std::min(first + 64, token < band ? band : in.tokens);
  float largest = 0.0f;
  for (int t = first; t < end; ++t) {
    largest = std::max(largest, ValueScale(in, Size(t * c.kv_heads + head)));
  }
  return largest;
}

bool Kept(const Fp8Case& c, const Inputs& in, int token, int head) {
  const int own = token + c.shift;
  return own >= in.tokens || in.decisions[Size(own * c.kv_heads + head)] == 0;
}

std::vector<double> RoundedQueries(const Inputs& in) {
  std::vector<double> q(in.q.size());
  std::transform(in.q.begin(), in.q.end(), q.begin(), [](Bf16 x) { return ToFloat(x); });
  const double octaves = double{in.scale} * 1.4426950408889634 * 8.0 / 127.0;
  const int least = static_cast<int>(std::ceil(-9.0 - std::log2(octaves)));
  for (size_t i = 0; i < q.size(); i += kDim) {
    double largest = 0.0;
    for (size_t d = 0; d < kDim; ++d) largest = std::max(largest, std::fabs(q[i + d]));
    const int exponent = largest == 0.0 ? least : std::max(least, std::ilogb(largest) + 1);
    const double unit = std::ldexp(1.0, exponent);
    for (size_t d = 0; d < kDim; ++d) q[i + d] = RoundE4m3(q[i + d] / unit) * unit;
  }
  return q;
}

Expected Attention(const Fp8Case& c, const Inputs& in, int prefix, const std::vector<double>& q,
                   bool sums) {
  const int heads = c.kv_heads * c.group;
  Expected e;
  e.out.resize(Size(in.tokens - prefix) * Size(heads * kDim));
  if (sums) {
    for (auto* x : {&e.absolute, &e.square, &e.underflow, &e.lost, &e.concentration, &e.scale}) {
      x->resize(e.out.size());
    }
  }
  std::vector<double> scales(Size(in.tokens * c.kv_heads)), w(Size(in.tokens));
  for (int t = 0; t < in.tokens; ++t) {
    for (int g = 0; g < c.kv_heads; ++g) {
      const size_t i = Size(t * c.kv_heads + g);
      const float scale = ValueScale(in, i), largest = LargestValueScale(c, in, prefix, t, g);
      scales[i] = std::ldexp(double{scale}, internal::PrefillFp8Octaves(scale, largest));
    }
  }
  for (int t = prefix; t < in.tokens; ++t) {
    for (int h = 0; h < heads; ++h) {
      const int g = h / c.group;
      const auto vector_of = [&](int j) { return Size(j * c.kv_heads + g); };
      const double* query = &q[Size(t * heads + h) * kDim];
      double largest = -INFINITY, sum = 0.0, top = 0.0;  // top: of weight times V's scale
      for (int j = 0; j <= t; ++j) {
        w[Size(j)] = -INFINITY;
        if (t - j > c.window && !Kept(c, in, j, g)) continue;
        const float* k = &in.stored_k[vector_of(j) * kDim];
        double dot = 0.0;
        for (int d = 0; d < kDim; ++d) dot += query[d] * double{k[d]};
        w[Size(j)] = dot * double{in.scale};
        largest = std::max(largest, w[Size(j)]);
      }
      for (int j = 0; j <= t; ++j) sum += w[Size(j)] = std::exp(w[Size(j)] - largest);
      for (int j = 0; j <= t; ++j) {
        w[Size(j)] /= sum;
        top = std::max(top, w[Size(j)] * scales[vector_of(j)]);
      }
      const size_t at = Size((t - prefix) * heads + h) * kDim;
      for (int j = 0; j <= t; ++j) {
        if (w[Size(j)] == 0.0) continue;
        const float* v = &in.stored_v[vector_of(j) * kDim];
        for (size_t d = 0; d < kDim; ++d) e.out[at + d] += w[Size(j)] * double{v[d]};
        if (!sums) continue;
        const double lost = std::min(w[Size(j)], 1.2 * 0x1p-13 * top / scales[vector_of(j)]);
        for (size_t d = 0; d < kDim; ++d) {
          const double term = w[Size(j)] * std::fabs(v[d]);
          e.absolute[at + d] += term;
          e.square[at + d] += term * term;
          e.underflow[at + d] += lost * std::fabs(v[d]);
          e.lost[at + d] += lost;
          e.scale[at + d] += w[Size(j)] * scales[vector_of(j)];
          e.concentration[at + d] += w[Size(j)] * w[Size(j)];
        }
      }
    }
  }
  return e;
}

}  // namespace winnow::kernels
