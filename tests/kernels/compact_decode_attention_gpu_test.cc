// LaunchCompactDecodeAttention against its CPU twin and against attention in double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "common/base/fp8.h"
#include "kernels/compact_decode_attention.h"
#include "kernels/cuda/compact_decode_attention.h"
#include "kernels/cuda/decode_plan.h"
#include "kernels/dms_prefill_attention.h"
#include "kernels/hadamard.h"
#include "tests/kernels/compact_decode_case.h"
#include "tests/kernels/random_shapes.h"

namespace winnow::kernels {
namespace {

class CompactDecodeGpu : public testing::TestWithParam<DecodeCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};
// Of one head over one span: the exact result, and how far a correct one may be from it.
//
// Scores: a query is a sum of two 16-bit floats, 2^-21 away (16 bits of it for bf16: 2^-16);
// of D products summed in float32, truncated, each step at most 2^-22 of the sum of their
// magnitudes, a; three more products. A probability is off by that and by 2^-21 of exp2 and
// of its own split (2^-16 for bf16), both above and below the fraction; with V's scale on it (and
// 2^8) 2^-32 of the largest scale, 2^-14 at least, is what 16-bit floats cannot hold. Sums: a
// matrix product adds 16 keys to the sum, two of them a page, after the sum is scaled; a warp has
// two pages of each PieceUnits(), then come kPagesPerUnit warps at most and, twice each, kMaxPieces
// pieces.
//
// The CPU sums the keys one by one, n steps; its dots and exp are float32.
struct Bounded {
  std::vector<double> out, bound, cpu_bound;
};
Bounded Reference(const DecodeCase& c, const KvLayout& layout, const Span& span, const float* q) {
  const int n = span.num_live(), dim = c.head_dim;
  std::vector<float> k(static_cast<size_t>(dim)), v(static_cast<size_t>(n * dim));
  std::vector<double> score(static_cast<size_t>(n));
  const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
  const bool bf16 = c.format == KvFormatId::kBf16;
  double max = -INFINITY, a = 0.0, largest_scale = 0x1p-14;
  std::vector<double> v_scale(static_cast<size_t>(n), 1.0);
  for (int j = 0; j < n; ++j) {
    const TokenRef token = SpanToken(layout, span, j);
    LoadK(c.format, dim, token, k.data());
    LoadV(c.format, dim, token, &v[static_cast<size_t>(j * dim)]);
    if (!bf16) {
      uint16_t half;
      std::memcpy(&half, token.v_scale, sizeof(half));
      v_scale[static_cast<size_t>(j)] = HalfToFloat(half);
    }
    largest_scale = std::max(largest_scale, v_scale[static_cast<size_t>(j)]);
    double dot = 0.0, magnitude = 0.0;
    for (int d = 0; d < dim; ++d) {
      const double x = double{q[d]} * k[static_cast<size_t>(d)];
      dot += x;
      magnitude += std::fabs(x);
    }
    score[static_cast<size_t>(j)] = dot * scale;
    max = std::max(max, dot * scale);
    a = std::max(a, magnitude * scale);
  }
  const double split = std::ldexp(1.0, bf16 ? -16 : -21);
  const double score_error = a * (split + (dim + 8) * std::ldexp(1.0, -22));
  const double p_error = 2.0 * score_error + std::ldexp(1.0, -21) + split;
  const int pages = n / layout.slots_per_page + 3;
  const double steps = (2 * 17 + 1) * 2 * PieceUnits(pages) + kPagesPerUnit + 2 * kMaxPieces;
  const double relative = 2.0 * p_error + steps * std::ldexp(1.0, -22);
  const double cpu_relative =
      2.0 * (2.0 * a * (dim + 8) * std::ldexp(1.0, -23) + std::ldexp(1.0, -20)) +
      n * std::ldexp(1.0, -23);
  const std::vector<double> zeros(static_cast<size_t>(dim));
  Bounded result{zeros, zeros, zeros};
  const double none = n * 448.0 * largest_scale * 0x1p-126;  // where float32 has no normal numbers
  double sum = 0.0;
  for (int j = 0; j < n; ++j) sum += std::exp(score[static_cast<size_t>(j)] - max);
  for (int d = 0; d < dim; ++d) {
    double out = 0.0, magnitude = 0.0, codes = 0.0;
    for (int j = 0; j < n; ++j) {
      codes += std::fabs(v[static_cast<size_t>(j * dim + d)]) / v_scale[static_cast<size_t>(j)];
      const double x =
          std::exp(score[static_cast<size_t>(j)] - max) * v[static_cast<size_t>(j * dim + d)];
      out += x;
      magnitude += std::fabs(x);
    }
    result.out[static_cast<size_t>(d)] = out / sum;
    const double lost = bf16 ? 0.0 : largest_scale * codes * 0x1p-32;
    result.bound[static_cast<size_t>(d)] = (relative * magnitude + lost + none) / sum;
    result.cpu_bound[static_cast<size_t>(d)] = (cpu_relative * magnitude + none) / sum;
  }
  return result;
}

std::vector<float> RunCpu(const DecodeCase& c, DeviceSpanCase* spans, const std::vector<float>& q) {
  std::vector<const Span*> batch;
  int max_live = 0;
  for (int s = 0; s < c.num_sequences; ++s) {
    batch.push_back(&spans->span(0, s, 0));
    for (int g = 0; g < c.num_kv_heads; ++g) {
      max_live = std::max(max_live, spans->span(0, s, g).num_live());
    }
  }
  const int heads = c.num_kv_heads * c.group;
  ThreadScratch scratch(1, AttentionScratchBytes(heads, c.num_kv_heads, c.head_dim, max_live));
  std::vector<float> out(q.size(), NAN);
  const absl::Status status =
      CompactDecodeAttentionCpu({.layout = spans->layout(),
                                 .spans = batch.data(),
                                 .q = q.data(),
                                 .out_f32 = out.data(),
                                 .num_seqs = c.num_sequences,
                                 .num_heads = heads,
                                 .num_kv_heads = c.num_kv_heads,
                                 .scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
                                 .scratch = &scratch},
                                nullptr);
  EXPECT_TRUE(status.ok()) << status;
  return out;
}

TEST_P(CompactDecodeGpu, IsWithinItsBoundOfTheExactResultAndTheCpus) {
  const DecodeCase& c = GetParam();
  DeviceSpanCase spans = Spans(c);
  const std::vector<float> q = RandomQueries(c, c.num_sequences);
  std::vector<float> got = Attend(c, spans, AllSlots(c), q);
  std::vector<float> cpu = RunCpu(c, &spans, q);
  const KvLayout layout = spans.layout();
  const bool rotated = KvFormatOf(c.format).rotated;
  int bad = 0;
  double worst = 0.0;
  for (int s = 0; s < c.num_sequences; ++s) {
    for (int h = 0; h < c.num_kv_heads * c.group; ++h) {
      const size_t at = static_cast<size_t>((s * c.num_kv_heads * c.group + h) * c.head_dim);
      const Bounded want = Reference(c, layout, spans.span(0, s, h / c.group), &q[at]);
      double slack = 0.0, cpu_slack = 0.0;
      if (rotated) {
        // The matrix is its own inverse, so errors from before stay in their channels. Each
        // rotation rounds log2(dim) + 1 times, at most (that) * 2^-24 * sum / sqrt(dim) a channel;
        // the kernel's comes back as up to sqrt(dim) of them.
        HadamardRotate(c.head_dim, &got[at]);
        HadamardRotate(c.head_dim, &cpu[at]);
        for (int d = 0; d < c.head_dim; ++d) {
          const size_t i = static_cast<size_t>(d);
          const double rounding = 9.0 * std::ldexp(1.0, -24);
          slack += rounding * (std::fabs(want.out[i]) + want.bound[i]);
          cpu_slack += rounding * (std::fabs(want.out[i]) + want.cpu_bound[i]);
        }
        slack *= 1.0 + 1.0 / std::sqrt(static_cast<double>(c.head_dim));
        cpu_slack *= 1.0 + 1.0 / std::sqrt(static_cast<double>(c.head_dim));
      }
      for (int d = 0; d < c.head_dim; ++d) {
        const size_t i = static_cast<size_t>(d);
        const double error = std::fabs(double{got[at + i]} - want.out[i]);
        const double bound = want.bound[i] + slack;
        const double difference = std::fabs(double{got[at + i]} - cpu[at + i]);
        const double both = bound + want.cpu_bound[i] + cpu_slack;
        if (!(error <= bound && difference <= both) && ++bad <= 5) {
          ADD_FAILURE() << "sequence " << s << " head " << h << " channel " << d << ": "
                        << got[at + i] << ", exact " << want.out[i] << " +- " << bound << ", CPU "
                        << cpu[at + i] << " +- " << both;
        }
        worst = std::max(worst, error / bound);
      }
    }
  }
  EXPECT_EQ(bad, 0);
  std::printf("%s: worst error is %.4f of its bound\n", c.name.c_str(), worst);
}

TEST_P(CompactDecodeGpu, BitsDoNotDependOnRunsOrBatchMates) {
  const DecodeCase& c = GetParam();
  DeviceSpanCase spans = Spans(c);
  const std::vector<float> q = RandomQueries(c, c.num_sequences);
  const std::vector<float> all = Attend(c, spans, AllSlots(c), q);
  const std::vector<float> again = Attend(c, spans, AllSlots(c), q, /*times=*/3);
  ASSERT_EQ(std::memcmp(all.data(), again.data(), all.size() * sizeof(float)), 0);
  // Few blocks: spans stay whole; many: all are cut.
  for (const int blocks : {1, 3, 1 << 20}) {
    const std::vector<float> dealt = Attend(c, spans, AllSlots(c), q, 1, blocks);
    ASSERT_EQ(std::memcmp(all.data(), dealt.data(), all.size() * sizeof(float)), 0)
        << blocks << " blocks";
  }
  const size_t row = q.size() / static_cast<size_t>(c.num_sequences);
  for (int s = 0; s < c.num_sequences; ++s) {
    const std::vector<float> own(q.begin() + static_cast<std::ptrdiff_t>(row) * s,
                                 q.begin() + static_cast<std::ptrdiff_t>(row) * (s + 1));
    // Behind a place of the batch that holds no sequence.
    std::vector<float> padded(row);
    padded.insert(padded.end(), own.begin(), own.end());
    const std::vector<float> alone = Attend(c, spans, {-1, s}, padded);
    EXPECT_EQ(std::memcmp(&alone[row], &all[row * static_cast<size_t>(s)], row * sizeof(float)), 0)
        << "sequence " << s;
    const std::vector<uint8_t> untouched(row * sizeof(float), 0xff);
    EXPECT_EQ(std::memcmp(alone.data(), untouched.data(), untouched.size()), 0);
  }
}
std::vector<SpanLength> EdgeLengths(int slots, int window) {
  return {{0, 0},         {0, 1},          {0, window - 1},     {0, window},
          {1, window},    {slots, window}, {slots + 1, window}, {2 * slots - 1, window},
          {4 * slots, 0}, {997, window},   {8 * slots + 1, 17}, {3, window}};
}

std::vector<DecodeCase> Cases() {
  std::vector<DecodeCase> cases;
  for (const KvFormat& format : kKvFormats) {
    for (const int dim : {64, 128}) {
      const std::string name = std::string(format.name) + "_d" + std::to_string(dim);
      const int slots = SlotsPerPage(format.id, dim);
      cases.push_back({.name = name + "_edges",
                       .format = format.id,
                       .head_dim = dim,
                       .group = 4,
                       .num_kv_heads = 2,
                       .window = 61,
                       .lengths = EdgeLengths(slots, 61),
                       .num_sequences = 6});
      cases.push_back({.name = name + "_dense",
                       .format = format.id,
                       .head_dim = dim,
                       .group = 6,
                       .num_kv_heads = 1,
                       .window = 0,
                       .lengths = {{0, 0}, {1, 0}, {slots * 4 - 1, 0}, {1531, 0}},
                       .num_sequences = 4});
    }
  }
  for (const KvFormatId format : {KvFormatId::kFp8, KvFormatId::kInt8H, KvFormatId::kBf16}) {
    cases.push_back({.name = "sinks_" + std::string(KvFormatName(format)),
                     .format = format,
                     .head_dim = format == KvFormatId::kFp8 ? 64 : 128,
                     .lengths = {{300, 256}, {0, 40}, {7, 256}, {2000, 256}},
                     .sinks = true});
  }
  for (const int group : {1, 2, 3, 4, 5, 8}) {
    cases.push_back({.name = "group" + std::to_string(group),
                     .group = group,
                     .num_kv_heads = 3,
                     .window = 256,
                     .lengths = {{100, 256}, {0, 256}, {1000, 256}, {20, 256}, {333, 256}},
                     .num_sequences = 3});
  }
  // Up to six pieces of a span, three in the share of each block.
  cases.push_back({.name = "clusters_of_4",
                   .num_kv_heads = 3,
                   .lengths = {{991, 256}, {700, 256}, {1200, 256}, {64, 256}, {0, 19}},
                   .num_sequences = 9});
  cases.push_back({.name = "clusters_of_2",
                   .num_kv_heads = 3,
                   .lengths = {{1210, 256}, {991, 256}, {1180, 256}, {960, 256}},
                   .num_sequences = 20});
  cases.push_back(
      {.name = "large_queries", .window = 16, .lengths = {{40, 16}, {7, 16}}, .q_scale = 3e5f});
  cases.push_back(
      {.name = "small_queries", .window = 16, .lengths = {{40, 16}, {7, 16}}, .q_scale = 1e-20f});
  // Two and four units a piece, several rounds of a warp, 40 rounds.
  cases.push_back({.name = "long",
                   .format = KvFormatId::kFp8,
                   .head_dim = 64,
                   .group = 2,
                   .num_kv_heads = 1,
                   .window = 128,
                   .lengths = {{8300, 128}, {17000, 128}, {300, 128}, {41000, 128}},
                   .num_sequences = 4});
  cases.push_back({.name = "very_long",
                   .format = KvFormatId::kInt8,
                   .head_dim = 64,
                   .group = 1,
                   .num_kv_heads = 1,
                   .window = 0,
                   .lengths = {{270000, 0}},
                   .num_sequences = 1});
  cases.push_back({.name = "batch256",
                   .format = KvFormatId::kK8V8,
                   .head_dim = 64,
                   .group = 3,
                   .num_kv_heads = 5,
                   .window = 16,
                   .lengths = {{0, 16}, {100, 16}, {7, 16}, {1, 16}, {64, 3}, {0, 0}, {201, 16}},
                   .num_sequences = 256});
  return cases;
}

std::vector<DecodeCase> RandomCases() {
  RandomShapes shapes(7);
  std::vector<DecodeCase> cases;
  for (int i = 0; i < 20; ++i) {
    DecodeCase c{.name = "number_" + std::to_string(i),
                 .format = shapes.Format(),
                 .head_dim = shapes.HeadDim(),
                 .group = shapes.In(1, kMaxDecodeGroup),
                 .num_kv_heads = shapes.In(1, 8),
                 .window = shapes.OneIn(6) ? 0 : shapes.Window(),
                 .lengths = {},
                 .num_sequences = shapes.Log(1, 20),
                 .sinks = shapes.OneIn(4)};
    const int most = 60'000 / (c.num_kv_heads * c.num_sequences * c.group);
    for (int n = shapes.In(1, 7); n > 0; --n) {
      c.lengths.push_back({.survivors = shapes.OneIn(4) ? 0 : shapes.Log(1, std::max(most, 2)),
                           .ring = shapes.OneIn(4) ? shapes.In(0, c.window) : c.window});
    }
    cases.push_back(c);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Random, CompactDecodeGpu, testing::ValuesIn(RandomCases()),
                         [](const auto& c) { return c.param.name; });
INSTANTIATE_TEST_SUITE_P(All, CompactDecodeGpu, testing::ValuesIn(Cases()),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
