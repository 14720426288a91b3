#include "tests/kernels/dms_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>

#include "common/base/bf16.h"
#include "common/base/fp8.h"

namespace winnow {

using kernels::KvFormatId;

DmsInputs::DmsInputs(const DmsCase& test_case) : c(test_case) {
  std::mt19937 rng(c.seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  const size_t dim = static_cast<size_t>(c.head_dim);
  const size_t heads = static_cast<size_t>(c.num_kv_heads);
  const size_t tokens = static_cast<size_t>(c.num_tokens);
  const auto fill = [&](size_t n, float sigma) {
    std::vector<float> x(n);
    for (float& value : x) value = sigma * normal(rng);
    return x;
  };
  q = fill(tokens * static_cast<size_t>(c.num_heads) * dim, 2.0f);
  k = fill(tokens * heads * dim, 1.5f);
  v = fill(tokens * heads * dim, 1.0f);
  const size_t row_bytes = kernels::TokenBytes(c.format, c.head_dim);
  rows.resize(tokens * heads * row_bytes);
  decisions.resize(tokens * heads);
  for (size_t i = 0; i < tokens * heads; ++i) {
    kernels::StoreRow(c.format, c.head_dim, &k[i * dim], &v[i * dim], &rows[i * row_bytes]);
    const double rate = c.evict_rate <= 0.0 || c.evict_rate >= 1.0
                            ? c.evict_rate
                            : c.evict_rate + 0.1 * static_cast<double>(i % heads);
    decisions[i] = uniform(rng) < rate ? 1 : 0;
  }
}

const uint8_t* DmsInputs::row(int t, int g) const {
  return &rows[at(t, g) * kernels::TokenBytes(c.format, c.head_dim)];
}

float DmsInputs::scale() const { return 1.0f / std::sqrt(static_cast<float>(c.head_dim)); }

std::unique_ptr<KvCache> MakeCache(const DmsCase& c, int sequences, bool poison) {
  const size_t pages = static_cast<size_t>(c.num_tokens / 16 + c.window / 16 + 4) *
                       static_cast<size_t>(c.num_kv_heads * sequences);
  auto cache = KvCache::Create({.format = c.format,
                                .num_layers = 1,
                                .num_kv_heads = c.num_kv_heads,
                                .head_dim = c.head_dim,
                                .window = c.window,
                                .shift = c.shift,
                                .budget_bytes = pages * (kernels::PageBytes(c.head_dim) + 300),
                                .max_sequences = sequences,
                                .poison = poison});
  EXPECT_TRUE(cache.ok()) << cache.status();
  return *std::move(cache);
}

namespace {

size_t QFloats(const DmsCase& c) { return static_cast<size_t>(c.num_heads * c.head_dim); }

kernels::ThreadScratch Scratch(const DmsCase& c, ThreadPool* pool) {
  return kernels::ThreadScratch(
      pool->num_threads(),
      kernels::AttentionScratchBytes(c.num_heads, c.num_kv_heads, c.head_dim, 2 * c.num_tokens));
}

}  // namespace

std::vector<float> Prefill(const DmsInputs& in, int begin, int end, int chunk, ThreadPool* pool,
                           SequenceCache* sequence, const KvCache& cache) {
  const DmsCase& c = in.c;
  kernels::ThreadScratch scratch = Scratch(c, pool);
  std::vector<float> out(static_cast<size_t>(end - begin) * QFloats(c), NAN);
  for (int t = begin; t < end; t += chunk) {
    const int n = std::min(chunk, end - t);
    EXPECT_TRUE(sequence->BeginStep(n).ok());
    const absl::Status status = kernels::DmsPrefillAttentionCpu(
        {.layout = cache.layout(),
         .spans = sequence->spans(0),
         .q = &in.q[static_cast<size_t>(t) * QFloats(c)],
         .rows = in.row(t, 0),
         .decisions = &in.decisions[in.at(t, 0)],
         .out_f32 = &out[static_cast<size_t>(t - begin) * QFloats(c)],
         .num_tokens = n,
         .num_heads = c.num_heads,
         .num_kv_heads = c.num_kv_heads,
         .scale = in.scale(),
         .scratch = &scratch},
        pool);
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_TRUE(sequence->Append(0, in.row(t, 0), &in.decisions[in.at(t, 0)], n).ok());
  }
  return out;
}

std::vector<float> Decode(const DmsInputs& in, int begin, int end, ThreadPool* pool,
                          SequenceCache* sequence, const KvCache& cache) {
  const DmsCase& c = in.c;
  kernels::ThreadScratch scratch = Scratch(c, pool);
  std::vector<float> out(static_cast<size_t>(end - begin) * QFloats(c), NAN);
  for (int t = begin; t < end; ++t) {
    EXPECT_TRUE(sequence->BeginStep(1).ok());
    kernels::Span* spans = sequence->StepSpans(0);
    for (int g = 0; g < c.num_kv_heads; ++g) {
      kernels::AdvanceSpan(cache.layout(), &spans[g], in.row(t, g), in.decisions[in.at(t, g)]);
    }
    const kernels::Span* const batch[] = {spans};
    const absl::Status status = kernels::CompactDecodeAttentionCpu(
        {.layout = cache.layout(),
         .spans = batch,
         .q = &in.q[static_cast<size_t>(t) * QFloats(c)],
         .out_f32 = &out[static_cast<size_t>(t - begin) * QFloats(c)],
         .num_seqs = 1,
         .num_heads = c.num_heads,
         .num_kv_heads = c.num_kv_heads,
         .scale = in.scale(),
         .scratch = &scratch},
        pool);
    EXPECT_TRUE(status.ok()) << status;
  }
  return out;
}

bool OracleVisible(const DmsInputs& in, int g, int i, int j) {
  if (j > i) return false;
  if (in.c.window == 0 || i - j <= in.c.window) return true;
  const int decider = in.c.shift == 1 ? j + 1 : j;
  return !in.decision(decider, g);
}

namespace {

// Element d of K (part 0) or V (part 1) of a flat row, by the documented layout.
double StoredElement(const DmsCase& c, const uint8_t* row, int part, int d) {
  using kernels::KvElement;
  const int dim = c.head_dim;
  const kernels::KvFormat& format = kernels::KvFormatOf(c.format);
  if (c.format == KvFormatId::kBf16) {
    Bf16 value;
    std::memcpy(&value, row + 2 * (part * dim + d), 2);
    return ToFloat(value);
  }
  uint16_t scale;
  std::memcpy(&scale, row + 2 * dim + 2 * part, 2);
  const uint8_t code = row[part * dim + d];
  const bool int8 = (part == 0 ? format.k : format.v) == KvElement::kInt8;
  return (int8 ? static_cast<int8_t>(code) : double{E4m3ToFloat(code)}) *
         double{HalfToFloat(scale)};
}

// The block-diagonal Hadamard matrix times x, by its definition.
std::vector<double> Rotated(const std::vector<double>& x) {
  const size_t n = x.size() & (~x.size() + 1);
  std::vector<double> y(x.size(), 0.0);
  for (size_t i = 0; i < x.size(); ++i) {
    for (size_t j = i / n * n; j < i / n * n + n; ++j) {
      y[i] += (std::popcount(i % n & j % n) % 2 == 0 ? x[j] : -x[j]) / std::sqrt(double(n));
    }
  }
  return y;
}

}  // namespace

std::vector<double> OracleAttention(const DmsInputs& in) {
  const DmsCase& c = in.c;
  const int group = c.num_heads / c.num_kv_heads;
  std::vector<double> out(in.q.size());
  for (int i = 0; i < c.num_tokens; ++i) {
    for (int h = 0; h < c.num_heads; ++h) {
      const size_t at = static_cast<size_t>((i * c.num_heads + h) * c.head_dim);
      const int g = h / group;
      std::vector<double> score(static_cast<size_t>(i + 1), -INFINITY);
      double max = -INFINITY;
      for (int j = 0; j <= i; ++j) {
        if (!OracleVisible(in, g, i, j)) continue;
        double dot = 0.0;
        for (int d = 0; d < c.head_dim; ++d) {
          dot += double{in.q[at + static_cast<size_t>(d)]} * StoredElement(c, in.row(j, g), 0, d);
        }
        score[static_cast<size_t>(j)] = dot / std::sqrt(double(c.head_dim));
        max = std::max(max, score[static_cast<size_t>(j)]);
      }
      double sum = 0.0;
      for (int j = 0; j <= i; ++j) {
        const double p = std::exp(score[static_cast<size_t>(j)] - max);
        if (p == 0.0) continue;
        sum += p;
        for (int d = 0; d < c.head_dim; ++d) {
          out[at + static_cast<size_t>(d)] += p * StoredElement(c, in.row(j, g), 1, d);
        }
      }
      const auto first = out.begin() + static_cast<std::ptrdiff_t>(at);
      std::vector<double> result(first, first + c.head_dim);
      for (double& value : result) value /= sum;
      if (kernels::KvFormatOf(c.format).rotated) result = Rotated(result);
      std::copy(result.begin(), result.end(), first);
    }
  }
  return out;
}

}  // namespace winnow
