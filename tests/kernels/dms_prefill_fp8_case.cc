#include "tests/kernels/dms_prefill_fp8_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

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

// Of V of a flat row: positive and finite here.
double ValueScale(const uint8_t* row) {
  uint16_t half;
  std::memcpy(&half, RowToken(KvFormatId::kFp8, kDim, row).v_scale, 2);
  const int exponent = half >> 10, fraction = half & 1023;
  return exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
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

bool Kept(const Fp8Case& c, const Inputs& in, int token, int head) {
  const int own = token + c.shift;
  return own >= in.tokens || in.decisions[Size(own * c.kv_heads + head)] == 0;
}

std::vector<double> RoundedQueries(const Fp8Case& c, const Inputs& in, int prefix) {
  std::vector<double> q(in.q.size());
  std::transform(in.q.begin(), in.q.end(), q.begin(), [](Bf16 x) { return ToFloat(x); });
  const int positions = 192 / c.group, heads = c.kv_heads * c.group;
  for (int first = prefix; first < in.tokens; first += positions) {
    const int rows = std::min(positions, in.tokens - first) * c.group;
    for (int g = 0; g < c.kv_heads; ++g) {
      for (int row0 = 0; row0 < rows; row0 += 16) {
        const auto for_each = [&](auto what) {
          for (int row = row0; row < std::min(row0 + 16, rows); ++row) {
            const int at = ((first + row / c.group) * heads + g * c.group + row % c.group) * kDim;
            for (int d = 0; d < kDim; ++d) what(q[Size(at + d)]);
          }
        };
        double largest = 0.0;
        for_each([&](double x) { largest = std::max(largest, std::fabs(x)); });
        const double unit = largest == 0.0 ? 1.0 : std::ldexp(1.0, std::ilogb(largest) - 7);
        for_each([&](double& x) { x = RoundE4m3(x / unit) * unit; });
      }
    }
  }
  return q;
}

Expected Attention(const Fp8Case& c, const Inputs& in, int prefix, const std::vector<double>& q,
                   bool sums) {
  const int heads = c.kv_heads * c.group;
  Expected e;
  e.out.resize(Size(in.tokens - prefix) * Size(heads * kDim));
  if (sums) {
    for (auto* x : {&e.absolute, &e.square, &e.underflow}) x->resize(e.out.size());
  }
  std::vector<double> scales(Size(in.tokens * c.kv_heads)), w(Size(in.tokens));
  for (size_t i = 0; i < scales.size(); ++i) scales[i] = ValueScale(&in.rows[i * kTokenBytes]);
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
        const double lost = std::min(w[Size(j)], 0x1p-17 * top / scales[vector_of(j)]);
        for (size_t d = 0; d < kDim; ++d) {
          const double term = w[Size(j)] * std::fabs(v[d]);
          e.absolute[at + d] += term;
          e.square[at + d] += term * term;
          e.underflow[at + d] += lost * std::fabs(v[d]);
        }
      }
    }
  }
  return e;
}

}  // namespace winnow::kernels
