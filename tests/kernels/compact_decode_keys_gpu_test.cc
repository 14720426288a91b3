// Which keys LaunchCompactDecodeAttention sees, what a plan too small does, and what is refused.
#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/cuda/compact_decode_attention.h"
#include "kernels/hadamard.h"
#include "tests/kernels/compact_decode_case.h"
#include "tests/kernels/decode_plan_memory.h"

namespace winnow::kernels {
namespace {

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

TEST(SpanCut, HalvesHaveEachPageOnce) {
  for (int pages = 1; pages <= 3000; ++pages) {
    const SpanCut cut(pages);
    int page = 0, index = 0;
    for (; page < pages; ++index) {
      ASSERT_EQ(cut.PieceIndex(page), index) << pages;
      ASSERT_EQ(cut.PieceStart(index), page) << pages;
      const int end = cut.PieceEnd(page);
      ASSERT_TRUE(page < end && end <= page + cut.unit) << pages;
      ASSERT_TRUE(page >= cut.half || end <= cut.half) << pages;
      page = end;
    }
    ASSERT_EQ(page, pages);
    ASSERT_EQ(index, cut.num_pieces()) << pages;
    ASSERT_LE(index, kMaxPieces) << pages;
    ASSERT_LE(index, MaxDecodePieces(1000, pages - 1) - MaxDecodePieces(999, 0)) << pages;
    if (pages <= 8) ASSERT_EQ(index, 1);
    if (pages > 8 && pages <= 64) ASSERT_TRUE(pages - cut.half > cut.half - 8) << pages;
  }
}

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
  good.scale = 0.125f;
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
  EXPECT_EQ(code([](auto& p) { p.num_seqs = kMaxDecodeRows / 2 + 1; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.spans.window = -1; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.plan.max_pieces = 0; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.q = p.q + 1; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.out_f32 = p.out_f32 + 2; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.plan.arrivals = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.scale = 0.0f; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.scale = NAN; }), invalid);
  const auto rows = [&](int num_seqs) {
    return ValidateDecodePlan(
        {.spans = good.spans, .slots = ints, .num_seqs = num_seqs, .plan = good.plan});
  };
  EXPECT_EQ(rows(kMaxDecodeRows / 2 + 1).code(), invalid);
  EXPECT_TRUE(rows(kMaxDecodeRows / 2).ok()) << rows(kMaxDecodeRows / 2);
}
}  // namespace
}  // namespace winnow::kernels
