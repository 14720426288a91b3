// dms_compact, and decode_prepare, which is dms_compact and one step of the spans.
#include "kernels/dms_compact.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "common/base/bf16.h"
#include "common/kv/sequence_cache.h"
#include "kernels/decode_prepare.h"
#include "kernels/hadamard.h"
#include "kernels/rope.h"

namespace winnow::kernels {
namespace {

constexpr int kHeads = 6, kKvHeads = 2, kDim = 32, kTokens = 23, kPositions = 100;

// One QKV row a token, as the GEMM gives it.
struct Fixture {
  explicit Fixture(uint32_t seed = 1) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](size_t n, float mean, float sigma) {
      std::vector<float> x(n);
      for (float& value : x) value = mean + sigma * normal(rng);
      return x;
    };
    qkv = fill(static_cast<size_t>(kTokens * kRow), 0.0f, 1.0f);
    // Borrowed channels near the threshold, 0.05.
    for (int t = 0; t < kTokens; ++t) {
      for (int g = 0; g < kKvHeads; ++g) {
        qkv[static_cast<size_t>(t * kRow + g * kGroup * kDim + kDim - 1)] =
            0.05f + 0.03f * normal(rng);
      }
    }
    q_norm = fill(kDim, 1.0f, 0.1f);
    k_norm = fill(kDim, 1.0f, 0.1f);
    logits = fill(kTokens * kKvHeads, 0.05f, 0.03f);
    for (int t = 0; t < kTokens; ++t) positions.push_back(t * 3 + 1);
    rope = *BuildRopeTable(kDim, kPositions, 10000.0f);
    q_out.assign(kTokens * kHeads * kDim, NAN);
    rows.assign(kTokens * kKvHeads * TokenBytes(KvFormatId::kBf16, kDim), 0xff);
    decisions.assign(kTokens * kKvHeads, 77);
  }

  DmsCompactParams Params() {
    return {.q = qkv.data(),
            .k = qkv.data() + kHeads * kDim,
            .v = qkv.data() + (kHeads + kKvHeads) * kDim,
            .q_stride = kRow,
            .k_stride = kRow,
            .v_stride = kRow,
            .logit_inputs = logits.data(),
            .logit_stride = kKvHeads,
            .positions = positions.data(),
            .rope_cos = rope.cos.data(),
            .rope_sin = rope.sin.data(),
            .num_positions = kPositions,
            .rule = {},
            .format = KvFormatId::kBf16,
            .q_out = q_out.data(),
            .rows = rows.data(),
            .decisions = decisions.data(),
            .num_tokens = kTokens,
            .num_heads = kHeads,
            .num_kv_heads = kKvHeads,
            .head_dim = kDim};
  }

  const float* q(int t, int h) const { return &qkv[static_cast<size_t>(t * kRow + h * kDim)]; }
  const float* out(int t, int h) const {
    return &q_out[static_cast<size_t>((t * kHeads + h) * kDim)];
  }
  uint8_t decision(int t, int g) const { return decisions[static_cast<size_t>(t * kKvHeads + g)]; }

  static constexpr int kGroup = kHeads / kKvHeads;
  static constexpr int kRow = (kHeads + 2 * kKvHeads) * kDim;
  std::vector<float> qkv, q_norm, k_norm, logits, q_out;
  std::vector<int32_t> positions;
  RopeTable rope;
  std::vector<uint8_t> rows, decisions;
};

// RMS norm and rotation of one head in double; the borrowed channel is zeroed
// before, or before and after, the rotation.
std::vector<double> Expected(const float* x, const float* weight, int position,
                             ChannelZeroing zeroing) {
  std::vector<double> y(x, x + kDim);
  if (weight != nullptr) {
    double sum = 0.0;
    for (const double value : y) sum += value * value;
    for (int d = 0; d < kDim; ++d) {
      y[static_cast<size_t>(d)] *= weight[d] / std::sqrt(sum / kDim + 1e-6);
    }
  }
  if (zeroing != ChannelZeroing::kNone) y.back() = 0.0;
  std::vector<double> out(kDim);
  for (size_t i = 0; i < kDim / 2; ++i) {
    const double angle = position * std::pow(10000.0, -2.0 * static_cast<double>(i) / kDim);
    out[i] = y[i] * std::cos(angle) - y[i + kDim / 2] * std::sin(angle);
    out[i + kDim / 2] = y[i + kDim / 2] * std::cos(angle) + y[i] * std::sin(angle);
  }
  if (zeroing == ChannelZeroing::kBeforeAndAfterRope) out.back() = 0.0;
  return out;
}

TEST(DmsCompact, NormsRotatesAndZeroesQueries) {
  for (const ChannelZeroing zeroing :
       {ChannelZeroing::kNone, ChannelZeroing::kBeforeRope, ChannelZeroing::kBeforeAndAfterRope}) {
    for (const bool norm : {false, true}) {
      Fixture f;
      DmsCompactParams p = f.Params();
      p.rule.zeroing = zeroing;
      p.q_norm = norm ? f.q_norm.data() : nullptr;
      ASSERT_TRUE(DmsCompactCpu(p, nullptr).ok());
      for (int t = 0; t < kTokens; ++t) {
        for (int h = 0; h < kHeads; ++h) {
          // Only the first head of each group lends a channel.
          const auto want = Expected(f.q(t, h), p.q_norm, f.positions[static_cast<size_t>(t)],
                                     h % Fixture::kGroup == 0 ? zeroing : ChannelZeroing::kNone);
          for (int d = 0; d < kDim; ++d) {
            ASSERT_NEAR(f.out(t, h)[d], want[static_cast<size_t>(d)], 2e-5) << t << " " << h;
          }
        }
      }
    }
  }
}

TEST(DmsCompact, StoresRotatedKeysAndPlainValues) {
  for (const bool norm : {false, true}) {
    Fixture f;
    DmsCompactParams p = f.Params();
    p.k_norm = norm ? f.k_norm.data() : nullptr;
    p.rule.zeroing = ChannelZeroing::kBeforeAndAfterRope;  // of queries alone
    ASSERT_TRUE(DmsCompactCpu(p, nullptr).ok());
    for (int t = 0; t < kTokens; ++t) {
      for (int g = 0; g < kKvHeads; ++g) {
        float k[kDim], v[kDim];
        const TokenRef token =
            RowToken(p.format, kDim,
                     &f.rows[static_cast<size_t>(t * kKvHeads + g) * TokenBytes(p.format, kDim)]);
        LoadK(p.format, kDim, token, k);
        LoadV(p.format, kDim, token, v);
        const auto want = Expected(p.k + t * Fixture::kRow + g * kDim, p.k_norm,
                                   f.positions[static_cast<size_t>(t)], ChannelZeroing::kNone);
        for (int d = 0; d < kDim; ++d) {
          const double w = want[static_cast<size_t>(d)];
          ASSERT_NEAR(k[d], w, std::fabs(w) / 250 + 2e-5);
          ASSERT_EQ(v[d], RoundToBf16(p.v[t * Fixture::kRow + g * kDim + d]));
        }
      }
    }
  }
}

// A rotated format's q, k and v are the other formats', times the matrix; the decision
// is taken before.
TEST(DmsCompact, RotatesForARotatedFormat) {
  Fixture plain, rotated;
  DmsCompactParams p = plain.Params(), r = rotated.Params();
  p.format = KvFormatId::kInt8;
  r.format = KvFormatId::kInt8H;
  for (DmsCompactParams* params : {&p, &r}) {
    params->q_norm = plain.q_norm.data();
    params->k_norm = plain.k_norm.data();
    params->rule = {.source = DecisionSource::kBorrowedAfterQNorm,
                    .zeroing = ChannelZeroing::kBeforeAndAfterRope};
    ASSERT_TRUE(DmsCompactCpu(*params, nullptr).ok());
  }
  EXPECT_EQ(rotated.decisions, plain.decisions);
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < kHeads; ++h) {
      float want[kDim];
      std::copy(plain.out(t, h), plain.out(t, h) + kDim, want);
      HadamardRotate(kDim, want);
      for (int d = 0; d < kDim; ++d) ASSERT_EQ(rotated.out(t, h)[d], want[d]) << t << " " << h;
    }
    for (int g = 0; g < kKvHeads; ++g) {
      // What K is before it is stored: a BF16 row has too few bits, so from the formula.
      const auto k = Expected(r.k + t * Fixture::kRow + g * kDim, r.k_norm,
                              rotated.positions[static_cast<size_t>(t)], ChannelZeroing::kNone);
      std::vector<float> want_k(k.begin(), k.end());
      std::vector<float> want_v(r.v + t * Fixture::kRow + g * kDim,
                                r.v + t * Fixture::kRow + (g + 1) * kDim);
      HadamardRotate(kDim, want_k.data());
      HadamardRotate(kDim, want_v.data());
      const TokenRef token = RowToken(
          r.format, kDim,
          &rotated.rows[static_cast<size_t>(t * kKvHeads + g) * TokenBytes(r.format, kDim)]);
      float got_k[kDim], got_v[kDim];
      LoadK(r.format, kDim, token, got_k);
      LoadV(r.format, kDim, token, got_v);
      for (const auto& [want, got] : {std::pair(&want_k, got_k), std::pair(&want_v, got_v)}) {
        float amax = 0.0f;
        for (const float x : *want) amax = std::max(amax, std::fabs(x));
        // Half a step of the scale, and the formula's float32 noise.
        const float bound = amax / 127.0f * (0.5f + 0x1p-9f) + 2e-5f;
        for (int d = 0; d < kDim; ++d) {
          ASSERT_NEAR(got[d], (*want)[static_cast<size_t>(d)], bound) << t << " " << g;
        }
      }
    }
  }
}

TEST(DmsCompact, BorrowedChannelBeforeQNorm) {
  Fixture f;
  DmsCompactParams p = f.Params();
  p.q_norm = f.q_norm.data();
  p.rule.source = DecisionSource::kBorrowedBeforeQNorm;
  ASSERT_TRUE(DmsCompactCpu(p, nullptr).ok());
  int evicted = 0;
  for (int t = 0; t < kTokens; ++t) {
    for (int g = 0; g < kKvHeads; ++g) {
      const float u = RoundToBf16(f.q(t, g * Fixture::kGroup)[kDim - 1]);
      EXPECT_EQ(f.decision(t, g), u * 100.0f - 5.0f > 0.0f ? 1 : 0);
      evicted += f.decision(t, g);
    }
  }
  EXPECT_GT(evicted, 5);
  EXPECT_LT(evicted, kTokens * kKvHeads - 5);
}

TEST(DmsCompact, BorrowedChannelAfterQNormUsesItsRawValueInTheNorm) {
  Fixture f;
  DmsCompactParams p = f.Params();
  p.q_norm = f.q_norm.data();
  p.rule.source = DecisionSource::kBorrowedAfterQNorm;
  p.rule.zeroing = ChannelZeroing::kBeforeAndAfterRope;
  ASSERT_TRUE(DmsCompactCpu(p, nullptr).ok());
  int evicted = 0, near = 0;
  for (int t = 0; t < kTokens; ++t) {
    for (int g = 0; g < kKvHeads; ++g) {
      const float* x = f.q(t, g * Fixture::kGroup);
      double sum = 0.0;
      for (int d = 0; d < kDim; ++d) sum += double{x[d]} * double{x[d]};
      const double u =
          double{x[kDim - 1]} / std::sqrt(sum / kDim + 1e-6) * double{f.q_norm[kDim - 1]};
      // A BF16 of 0.05 is within 2^-10 of it, 0.01 of a logit after scaling.
      if (std::fabs(u * 100.0 - 5.0) < 0.03) {
        ++near;
        continue;
      }
      EXPECT_EQ(f.decision(t, g), u > 0.05 ? 1 : 0) << u;
      evicted += f.decision(t, g);
    }
  }
  EXPECT_LT(near, 4);
  EXPECT_GT(evicted, 5);
}

// The first BF16 above 0.05: float32 arithmetic evicts, BF16 arithmetic would
// keep (100 u rounds to 5).
TEST(DmsCompact, ThresholdIsStrictAndInFloat32) {
  const DecisionRule rule;
  EXPECT_TRUE(rule.Evicts(ToFloat(Bf16{0x3d4d})));
  EXPECT_FALSE(rule.Evicts(ToFloat(Bf16{0x3d4c})));
  DecisionRule exact;
  exact.scale = 128.0f;
  exact.offset = 4.0f;
  EXPECT_FALSE(exact.Evicts(0.03125f));  // exactly at the threshold
  EXPECT_FALSE(rule.Evicts(NAN));
}

TEST(DmsCompact, RoundingOfTheBorrowedChannelCanBeOff) {
  Fixture f;
  DmsCompactParams p = f.Params();
  p.rule.source = DecisionSource::kBorrowedBeforeQNorm;
  // Rounds up to 0x3d4d, just past the threshold that it lies below.
  f.qkv[kDim - 1] = 0.04999f;
  ASSERT_TRUE(DmsCompactCpu(p, nullptr).ok());
  EXPECT_EQ(f.decision(0, 0), 1);
  p.rule.round_to_bf16 = false;
  ASSERT_TRUE(DmsCompactCpu(p, nullptr).ok());
  EXPECT_EQ(f.decision(0, 0), 0);
}

TEST(DmsCompact, SeparateLogitsPerHeadAndPerLayer) {
  for (const bool per_layer : {false, true}) {
    Fixture f;
    DmsCompactParams p = f.Params();
    p.rule.source = DecisionSource::kLogits;
    p.rule.per_layer = per_layer;
    ASSERT_TRUE(DmsCompactCpu(p, nullptr).ok());
    for (int t = 0; t < kTokens; ++t) {
      for (int g = 0; g < kKvHeads; ++g) {
        const float u = f.logits[static_cast<size_t>(t * kKvHeads + (per_layer ? 0 : g))];
        EXPECT_EQ(f.decision(t, g), u * 100.0f - 5.0f > 0.0f ? 1 : 0);
      }
    }
  }
}

TEST(DmsCompact, NoSourceKeepsAllAndDecisionsMayBeUnwanted) {
  Fixture f;
  DmsCompactParams p = f.Params();
  ASSERT_TRUE(DmsCompactCpu(p, nullptr).ok());
  EXPECT_EQ(f.decisions, std::vector<uint8_t>(kTokens * kKvHeads, 0));
  Fixture other;
  DmsCompactParams silent = other.Params();
  silent.decisions = nullptr;
  silent.rule.source = DecisionSource::kLogits;
  silent.logit_inputs = nullptr;
  ASSERT_TRUE(DmsCompactCpu(silent, nullptr).ok());
  EXPECT_EQ(other.rows, f.rows);
  EXPECT_EQ(other.q_out, f.q_out);
}

TEST(DmsCompact, RowsDoNotDependOnBatchOrThreads) {
  for (const KvFormat& format : kKvFormats) {
    Fixture whole;
    DmsCompactParams p = whole.Params();
    p.format = format.id;
    p.q_norm = whole.q_norm.data();
    p.k_norm = whole.k_norm.data();
    p.rule = {.source = DecisionSource::kBorrowedAfterQNorm,
              .zeroing = ChannelZeroing::kBeforeAndAfterRope};
    ThreadPool pool(3);
    ASSERT_TRUE(DmsCompactCpu(p, &pool).ok());
    Fixture single;
    DmsCompactParams one = single.Params();
    one.format = p.format;
    one.q_norm = p.q_norm;
    one.k_norm = p.k_norm;
    one.rule = p.rule;
    one.num_tokens = 1;
    for (int t = 0; t < kTokens; ++t) {
      one.q = p.q + t * Fixture::kRow;
      one.k = p.k + t * Fixture::kRow;
      one.v = p.v + t * Fixture::kRow;
      one.positions = p.positions + t;
      one.q_out = &single.q_out[static_cast<size_t>(t * kHeads * kDim)];
      one.rows = &single.rows[static_cast<size_t>(t * kKvHeads) * TokenBytes(p.format, kDim)];
      one.decisions = &single.decisions[static_cast<size_t>(t * kKvHeads)];
      ASSERT_TRUE(DmsCompactCpu(one, nullptr).ok());
    }
    EXPECT_EQ(single.q_out, whole.q_out);
    EXPECT_EQ(single.rows, whole.rows);
    EXPECT_EQ(single.decisions, whole.decisions);
  }
}

TEST(DmsCompact, BadParamsAreNamed) {
  Fixture f;
  const auto code = [&](auto change) {
    DmsCompactParams p = f.Params();
    change(&p);
    return DmsCompactCpu(p, nullptr).code();
  };
  constexpr auto kBad = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](auto* p) { p->q = nullptr; }), kBad);
  EXPECT_EQ(code([](auto* p) { p->rows = nullptr; }), kBad);
  EXPECT_EQ(code([](auto* p) { p->num_heads = 5; }), kBad);
  EXPECT_EQ(code([](auto* p) { p->num_positions = 67; }), kBad);  // the last position is 67
  EXPECT_EQ(code([](auto* p) { p->head_dim = 20; }), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(code([](auto* p) {
              p->rule.source = DecisionSource::kLogits;
              p->logit_inputs = nullptr;
            }),
            kBad);
}

TEST(DecodePrepare, EqualsCompactAndAppend) {
  for (const auto& [format, window] :
       {std::pair(KvFormatId::kFp8, 0), {KvFormatId::kFp8, 4}, {KvFormatId::kInt8H, 4}}) {
    auto cache = *KvCache::Create({.format = format,
                                   .num_layers = 1,
                                   .num_kv_heads = kKvHeads,
                                   .head_dim = kDim,
                                   .window = window,
                                   .budget_bytes = 1 << 20,
                                   .max_sequences = 3,
                                   .poison = true});
    Fixture f;
    DmsCompactParams p = f.Params();
    p.format = format;
    p.rule.source = DecisionSource::kLogits;
    SequenceCache chunked = *cache->NewSequence();
    SequenceCache a = *cache->NewSequence();
    SequenceCache b = *cache->NewSequence();
    ASSERT_TRUE(DmsCompactCpu(p, nullptr).ok());
    ASSERT_TRUE(chunked.Append(0, f.rows.data(), f.decisions.data(), kTokens).ok());
    const std::vector<float> q = f.q_out;

    // Sequences a and b take the same tokens, two at a time in one batch.
    ThreadPool pool(2);
    Fixture step;
    for (int t = 0; t < kTokens; ++t) {
      DecodePrepareParams d = {.compact = step.Params(), .layout = cache->layout()};
      d.compact.format = p.format;
      d.compact.rule = p.rule;
      d.compact.num_tokens = 2;
      d.compact.q = p.q + t * Fixture::kRow;
      d.compact.k = p.k + t * Fixture::kRow;
      d.compact.v = p.v + t * Fixture::kRow;
      d.compact.q_stride = d.compact.k_stride = d.compact.v_stride = 0;  // the same row twice
      d.compact.logit_inputs = p.logit_inputs + t * kKvHeads;
      d.compact.logit_stride = 0;
      const int32_t positions[] = {p.positions[t], p.positions[t]};
      d.compact.positions = positions;
      ASSERT_TRUE(a.BeginStep(1).ok());
      ASSERT_TRUE(b.BeginStep(1).ok());
      Span* const spans[] = {a.StepSpans(0), b.StepSpans(0)};
      d.spans = spans;
      ASSERT_TRUE(DecodePrepareCpu(d, &pool).ok());
      for (int s = 0; s < 2; ++s) {
        ASSERT_EQ(
            std::memcmp(&step.q_out[static_cast<size_t>(s * kHeads * kDim)],
                        &q[static_cast<size_t>(t * kHeads * kDim)], kHeads * kDim * sizeof(float)),
            0);
      }
    }
    std::vector<uint8_t> want(chunked.ExportBytes(0)), got(a.ExportBytes(0));
    chunked.Export(0, want.data());
    a.Export(0, got.data());
    EXPECT_EQ(got, want);
    got.assign(b.ExportBytes(0), 0);
    b.Export(0, got.data());
    EXPECT_EQ(got, want);
    if (window > 0) {
      EXPECT_LT(a.live_tokens(), 2 * kTokens);
    }
  }
}

TEST(DecodePrepare, LayoutMustMatch) {
  Fixture f;
  Span* spans[1] = {nullptr};
  DecodePrepareParams p = {.compact = f.Params(), .layout = {}, .spans = spans};
  p.compact.num_tokens = 0;
  p.layout.format = KvFormatId::kBf16;
  p.layout.head_dim = kDim;
  EXPECT_TRUE(DecodePrepareCpu(p, nullptr).ok());
  p.layout.format = KvFormatId::kFp8;
  EXPECT_EQ(DecodePrepareCpu(p, nullptr).code(), absl::StatusCode::kInvalidArgument);
  p.layout.format = KvFormatId::kBf16;
  p.layout.window = 4;
  p.compact.rule.source = DecisionSource::kLogits;
  p.compact.decisions = nullptr;
  EXPECT_EQ(DecodePrepareCpu(p, nullptr).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace winnow::kernels
