// LaunchCompactDecodeAttention against its CPU twin and against attention in double.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "kernels/compact_decode_attention.h"
#include "kernels/cuda/compact_decode_attention.h"
#include "kernels/dms_prefill_attention.h"
#include "kernels/hadamard.h"
#include "tests/kernels/decode_plan_memory.h"
#include "tests/kernels/device_span_case.h"

namespace winnow::kernels {
namespace {

struct DecodeCase {
  std::string name;
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 128, group = 4, num_kv_heads = 2, window = 256;
  std::vector<SpanLength> lengths;  // in turn over sequences and heads
  int num_sequences = 4;
  float q_scale = 2.0f;

  friend void PrintTo(const DecodeCase& c, std::ostream* os) { *os << c.name; }
};

std::vector<SpanLength> Lengths(const DecodeCase& c) {
  std::vector<SpanLength> out;
  for (int i = 0; i < c.num_sequences * c.num_kv_heads; ++i) {
    out.push_back(c.lengths[static_cast<size_t>(i) % c.lengths.size()]);
  }
  return out;
}

class CompactDecodeGpu : public testing::TestWithParam<DecodeCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};

// Output [sequences of `slots`, heads, head_dim]; a row without a sequence keeps its 0xff.
std::vector<float> Attend(const DecodeCase& c, const DeviceSpanCase& spans,
                          const std::vector<int32_t>& slots, const std::vector<float>& q,
                          int times = 1, int force_blocks = 0) {
  const int rows = static_cast<int>(slots.size()) * c.num_kv_heads;
  PlanMemory memory(rows, spans.total_pages(), c.group, c.head_dim);
  DeviceArray<int32_t> device_slots(slots);
  DeviceArray<float> device_q(q), out(q.size());
  cudaStream_t stream = nullptr;
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  absl::Status status = LaunchDecodePlan({.spans = spans.device(),
                                          .slots = device_slots.get(),
                                          .num_seqs = static_cast<int>(slots.size()),
                                          .plan = memory.plan(),
                                          .force_blocks = force_blocks},
                                         stream);
  EXPECT_TRUE(status.ok()) << status;
  for (int i = 0; i < times; ++i) {
    status =
        LaunchCompactDecodeAttention({.spans = spans.device(),
                                      .plan = memory.plan(),
                                      .q = device_q.get(),
                                      .out_f32 = out.get(),
                                      .num_seqs = static_cast<int>(slots.size()),
                                      .num_heads = c.num_kv_heads * c.group,
                                      .scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
                                      .overlap_launch = i > 0},
                                     stream);
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  for (const int32_t left : memory.arrivals.Get()) EXPECT_EQ(left, 0);
  for (const int32_t left : memory.next_piece.Get()) EXPECT_EQ(left, 0);
  EXPECT_EQ(memory.overflow.Get()[0], 0);
  memory.pieces.Get();  // checks what lies around them
  memory.out.Get();
  memory.norm.Get();
  return out.Get();
}

std::vector<float> RandomQueries(const DecodeCase& c, int num_sequences) {
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<float> q(static_cast<size_t>(num_sequences * c.num_kv_heads * c.group * c.head_dim));
  for (float& x : q) x = c.q_scale * normal(rng);
  return q;
}

DeviceSpanCase Spans(const DecodeCase& c) {
  return DeviceSpanCase({.format = c.format,
                         .head_dim = c.head_dim,
                         .window = c.window,
                         .num_kv_heads = c.num_kv_heads,
                         .spare_pages = 3},
                        c.num_sequences, Lengths(c));
}

std::vector<int32_t> AllSlots(const DecodeCase& c) {
  std::vector<int32_t> slots;
  for (int s = 0; s < c.num_sequences; ++s) slots.push_back(s);
  return slots;
}

// Of one head over one span: the exact result, and how far a correct one may be from it.
//
// Scores: a query is a sum of two 16-bit floats, 2^-21 away (16 bits of it for bf16: 2^-16);
// of D products summed in float32, truncated, each step at most 2^-22 of the sum of their
// magnitudes, a; three more products. A probability is off by that and by 2^-21 of exp2 and
// of its own split (2^-16 for bf16), both above and below the fraction. Sums: a matrix product
// adds 16 keys to the sum, two of them a page, after the sum is scaled; a warp has two pages
// of each PieceUnits(), then come kPagesPerUnit warps at most and, twice each, kMaxPieces pieces.
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
  double max = -INFINITY, a = 0.0;
  for (int j = 0; j < n; ++j) {
    const TokenRef token = SpanToken(layout, span, j);
    LoadK(c.format, dim, token, k.data());
    LoadV(c.format, dim, token, &v[static_cast<size_t>(j * dim)]);
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
  const bool bf16 = c.format == KvFormatId::kBf16;
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
  double sum = 0.0;
  for (int j = 0; j < n; ++j) sum += std::exp(score[static_cast<size_t>(j)] - max);
  for (int d = 0; d < dim; ++d) {
    double out = 0.0, magnitude = 0.0;
    for (int j = 0; j < n; ++j) {
      const double x =
          std::exp(score[static_cast<size_t>(j)] - max) * v[static_cast<size_t>(j * dim + d)];
      out += x;
      magnitude += std::fabs(x);
    }
    result.out[static_cast<size_t>(d)] = out / sum;
    result.bound[static_cast<size_t>(d)] = relative * magnitude / sum;
    result.cpu_bound[static_cast<size_t>(d)] = cpu_relative * magnitude / sum;
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

struct MarkerCase {
  KvFormatId format;
  int head_dim, group;
  std::vector<int> lengths;  // live tokens of each sequence
  friend void PrintTo(const MarkerCase& c, std::ostream* os) {
    *os << KvFormatName(c.format) << " of " << c.head_dim << " channels, group " << c.group;
  }
};

class CompactDecodeMarkers : public testing::TestWithParam<MarkerCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};

// Whether key `token` has a marker in channel `d`: the bits of its number, then of a hash.
bool HasMarker(int token, int d) {
  if (d == 0) return true;
  if (d <= 19) return (token >> (d - 1) & 1) != 0;
  uint64_t x = static_cast<uint64_t>(token) * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
  x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 29)) * (2 * static_cast<uint64_t>(d) + 1);
  return (x >> 63) != 0;
}

// A query of zeros weighs all keys alike, and V holds 0, a power of two or, in channel 0, the
// largest code, with a scale of 1: all sums are exact, so a channel counts its markers and a
// key that is lost, or seen twice, shows in half of the channels.
TEST_P(CompactDecodeMarkers, EachLiveKeyCountsOnce) {
  const MarkerCase& m = GetParam();
  const KvElement element = KvFormatOf(m.format).v;
  const float largest = element == KvElement::kE4m3   ? 448.0f
                        : element == KvElement::kInt8 ? 127.0f
                                                      : 1.0f;
  const float marker = element == KvElement::kBf16 ? 1.0f : 64.0f;
  constexpr int kWindow = 64;
  const auto token = [&](int j, float*, float* v) {
    for (int d = 0; d < m.head_dim; ++d) {
      v[d] = d == 0 ? largest : HasMarker(j, d) ? marker : 0.0f;
    }
  };
  DecodeCase c{.format = m.format,
               .head_dim = m.head_dim,
               .group = m.group,
               .num_kv_heads = 1,
               .window = kWindow,
               .num_sequences = static_cast<int>(m.lengths.size())};
  for (const int n : m.lengths) {
    const int ring = std::min(n - 1, kWindow);
    c.lengths.push_back({n - 1 - ring, ring});
  }
  const DeviceSpanCase spans({.format = m.format,
                              .head_dim = m.head_dim,
                              .window = kWindow,
                              .num_kv_heads = 1,
                              .token = token},
                             c.num_sequences, c.lengths);
  const std::vector<float> q(static_cast<size_t>(c.num_sequences * m.group * m.head_dim));
  std::vector<float> got = Attend(c, spans, AllSlots(c), q);
  for (size_t s = 0; s < m.lengths.size(); ++s) {
    const int n = m.lengths[s];
    std::vector<int> count(static_cast<size_t>(m.head_dim));
    for (int j = 0; j < n; ++j) {
      for (int d = 0; d < m.head_dim; ++d) count[static_cast<size_t>(d)] += HasMarker(j, d) ? 1 : 0;
    }
    for (int h = 0; h < m.group; ++h) {
      float* out = &got[(s * static_cast<size_t>(m.group) + static_cast<size_t>(h)) *
                        static_cast<size_t>(m.head_dim)];
      if (KvFormatOf(m.format).rotated) HadamardRotate(m.head_dim, out);
      for (int d = 0; d < m.head_dim; ++d) {
        const double unit = d == 0 ? largest : marker;
        // Off by a division's rounding, or both rotations', far below half a key.
        ASSERT_NEAR(double{out[d]} * n / unit, count[static_cast<size_t>(d)], 0.4)
            << "length " << n << " head " << h << " channel " << d;
      }
    }
  }
}

std::vector<MarkerCase> MarkerCases() {
  std::vector<MarkerCase> cases;
  for (const KvFormat& format : kKvFormats) {
    for (const int dim : {64, 128}) {
      const std::vector<int> lengths = {1,   2,    15,   16,   17,   31,   32,   33,   47,  64,
                                        65,  66,   81,   97,   98,   127,  321,  322,  577, 833,
                                        997, 1024, 1500, 2017, 2049, 2081, 2113, 4099, 8209};
      cases.push_back({format.id, dim, 4, lengths});
      cases.push_back({format.id, dim, 7, lengths});
      // The rotations' rounding would hide a key of more.
      if (!format.rotated) cases.push_back({format.id, dim, 1, {70001, 32801, 16511}});
    }
  }
  cases.push_back({KvFormatId::kFp8, 64, 2, {270000}});
  cases.push_back({KvFormatId::kK8V8, 64, 1, {270000}});
  cases.push_back({KvFormatId::kBf16, 64, 1, {270000}});
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, CompactDecodeMarkers, testing::ValuesIn(MarkerCases()),
                         [](const auto& c) {
                           return std::string(KvFormatName(c.param.format)) + "_d" +
                                  std::to_string(c.param.head_dim) + "_group" +
                                  std::to_string(c.param.group) + "_" +
                                  std::to_string(c.param.lengths.front());
                         });

TEST(CompactDecodePlan, SaysWhenPiecesDoNotFit) {
  RequireGpu();
  if (testing::Test::IsSkipped()) return;
  const DecodeCase c{.num_kv_heads = 2, .window = 64, .lengths = {{700, 64}}, .num_sequences = 3};
  const DeviceSpanCase spans = Spans(c);
  const int rows = c.num_kv_heads * c.num_sequences;  // of 25 pages, 4 pieces
  DeviceArray<int32_t> slots(AllSlots(c));
  DeviceArray<float> q(RandomQueries(c, c.num_sequences)), out(q.size());
  for (const int missing : {0, 1, 7}) {
    const int max_pieces = 4 * rows - missing;  // too few for shares of clusters
    PlanMemory memory(rows, 0, c.group, c.head_dim);
    DeviceArray<DecodePiece> pieces(static_cast<size_t>(max_pieces));
    const size_t heads = static_cast<size_t>(max_pieces * c.group);
    DeviceArray<float> partial_out(heads * static_cast<size_t>(c.head_dim)),
        partial_norm(heads * 2);
    DecodePlan plan = memory.plan();
    plan.pieces = pieces.get();
    plan.partial_out = partial_out.get();
    plan.partial_norm = partial_norm.get();
    plan.max_pieces = max_pieces;
    out.Fill(0xff);
    ASSERT_TRUE(LaunchDecodePlan({.spans = spans.device(),
                                  .slots = slots.get(),
                                  .num_seqs = c.num_sequences,
                                  .plan = plan},
                                 nullptr)
                    .ok());
    ASSERT_TRUE(LaunchCompactDecodeAttention({.spans = spans.device(),
                                              .plan = plan,
                                              .q = q.get(),
                                              .out_f32 = out.get(),
                                              .num_seqs = c.num_sequences,
                                              .num_heads = c.num_kv_heads * c.group,
                                              .scale = 0.1f},
                                             nullptr)
                    .ok());
    EXPECT_EQ(memory.overflow.Get()[0], missing == 0 ? 0 : 1);
    EXPECT_EQ(memory.num_pieces.Get()[0], missing == 0 ? 4 * rows : 0);
    pieces.Get();  // checks what lies around them
    partial_out.Get();
    partial_norm.Get();
    for (const int32_t left : memory.arrivals.Get()) EXPECT_EQ(left, 0);
    for (const float x : out.Get()) ASSERT_EQ(std::isnan(x), missing != 0);
  }
}

TEST(CompactDecodeParams, RefusesWhatItCannotDo) {
  alignas(64) static uint8_t memory[128];
  auto* ints = reinterpret_cast<int32_t*>(memory);
  auto* floats = reinterpret_cast<float*>(memory);
  CompactDecodeAttentionCudaParams good;
  good.spans.head_dim = 64;
  good.spans.num_layers = 1;
  good.spans.num_kv_heads = 2;
  good.spans.max_sequences = 1;
  good.spans.window = 4;
  good.spans.pages = good.spans.newest = good.spans.ring_evict = memory;
  good.spans.state = reinterpret_cast<SpanState*>(memory);
  good.spans.survivor_pages = good.spans.ring_pages = ints;
  good.plan = {.pieces = reinterpret_cast<DecodePiece*>(memory),
               .num_pieces = ints,
               .next_piece = ints,
               .arrivals = ints,
               .partial_out = floats,
               .partial_norm = floats,
               .max_pieces = 8,
               .overflow = ints};
  good.q = good.out_f32 = floats;
  good.num_seqs = 1;
  good.num_heads = 6;
  ASSERT_TRUE(ValidateCompactDecodeAttention(good).ok()) << ValidateCompactDecodeAttention(good);
  const auto code = [&](auto change) {
    CompactDecodeAttentionCudaParams p = good;
    change(p);
    return ValidateCompactDecodeAttention(p).code();
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](auto& p) { p.spans.head_dim = 96; }), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(code([](auto& p) { p.num_heads = 18; }), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(code([](auto& p) { p.num_heads = 5; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.layer = 1; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.spans.window = -1; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.plan.max_pieces = 0; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.q = p.q + 1; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.out_f32 = p.out_f32 + 2; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.plan.arrivals = nullptr; }), invalid);
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
  for (const int group : {1, 2, 3, 4, 5, 8}) {
    cases.push_back({.name = "group" + std::to_string(group),
                     .group = group,
                     .num_kv_heads = 3,
                     .window = 256,
                     .lengths = {{100, 256}, {0, 256}, {1000, 256}, {20, 256}, {333, 256}},
                     .num_sequences = 3});
  }
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

INSTANTIATE_TEST_SUITE_P(All, CompactDecodeGpu, testing::ValuesIn(Cases()),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
