#include "kernels/prefill_primitives.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "tests/kernels/left_pad_2d_case.h"

namespace winnow::kernels {
namespace {

using Ints = std::vector<int32_t>;
using Mask = std::vector<uint8_t>;

TEST(LeftPad2d, Golden) {
  const Ints in = {1, 2, 3, 0}, lens = {3};
  Ints out(4, -7);
  ASSERT_TRUE(LeftPad2dCpu({in.data(), lens.data(), out.data(), 1, 4, sizeof(int32_t)}).ok());
  EXPECT_EQ(out, (Ints{0, 1, 2, 3}));
}

class LeftPad2d : public testing::TestWithParam<LeftPad2dCase> {};

TEST_P(LeftPad2d, EveryByte) {
  const LeftPad2dCase& c = GetParam();
  const LeftPad2dInputs x(c);
  std::vector<uint8_t> out(x.in.size() + 1, 0xcd);
  ASSERT_TRUE(
      LeftPad2dCpu({x.in.data(), x.lens.data(), out.data(), c.num_rows, c.seq, c.row_bytes}).ok());
  EXPECT_EQ(out.back(), 0xcd);
  size_t at = 0;
  for (int n = 0; n < c.num_rows; ++n) {
    const int pad = c.seq - x.lens[static_cast<size_t>(n)];
    for (int s = 0; s < c.seq; ++s) {
      for (size_t b = 0; b < c.row_bytes; ++b, ++at) {
        const size_t from = at - static_cast<size_t>(pad) * c.row_bytes;
        ASSERT_EQ(out[at], s < pad ? 0 : x.in[from]);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, LeftPad2d, testing::ValuesIn(kLeftPad2dCases),
                         [](const auto& c) { return std::string(c.param.name); });

TEST(LeftPad2d, BadParams) {
  const Ints in = {1, 2}, lens = {3};
  Ints out(2);
  EXPECT_EQ(LeftPad2dCpu({in.data(), lens.data(), out.data(), 1, 2, 4}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(LeftPad2dCpu({nullptr, lens.data(), out.data(), 1, 2, 4}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(LeftPad2dCpu({in.data(), lens.data(), out.data(), -1, 2, 4}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(LeftPad2dCpu({in.data(), lens.data(), out.data(), 1, 2, 0}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ValidateLeftPad2d({in.data(), lens.data(), out.data(), 1, (1 << 30) + 1, 4}).code(),
            absl::StatusCode::kInvalidArgument);
#if !defined(WINNOW_HAVE_CUDA)
  EXPECT_EQ(LaunchLeftPad2d({in.data(), lens.data(), out.data(), 1, 2, 4}, nullptr).code(),
            absl::StatusCode::kUnimplemented);
#endif
}

TEST(BoolGatherLeftPad, GoldenAndBack) {
  const Ints in = {10, 11, 12, 13, 14};
  const Mask mask = {0, 1, 1, 0, 1};
  Ints out(5, -7), idx(5, -7), counts(1, -7);
  ASSERT_TRUE(BoolGatherLeftPadCpu({.in = in.data(),
                                    .mask = mask.data(),
                                    .out = out.data(),
                                    .idx = idx.data(),
                                    .counts = counts.data(),
                                    .batch = 1,
                                    .num_heads = 1,
                                    .seq = 5,
                                    .row_bytes = 4})
                  .ok());
  EXPECT_EQ(out, (Ints{0, 0, 11, 12, 14}));
  EXPECT_EQ(idx, (Ints{1, 2, 4, -1, -1}));
  EXPECT_EQ(counts, (Ints{3}));
  Ints back(5, -7);
  ASSERT_TRUE(ScatterByIndexCpu({.in = out.data(),
                                 .idx = idx.data(),
                                 .lens = counts.data(),
                                 .out = back.data(),
                                 .batch = 1,
                                 .in_seq = 5,
                                 .out_seq = 5,
                                 .max_len = 5,
                                 .row_bytes = 4})
                  .ok());
  EXPECT_EQ(back, (Ints{0, 11, 12, 0, 14}));
}

// The upstream kernels copy the first 128 channels of wider rows alone.
TEST(BoolGatherLeftPad, WideRowsSurviveTheRoundTrip) {
  constexpr int kBatch = 3, kHeads = 2, kSeq = 9, kWidth = 4096;
  std::mt19937 rng(2);
  Ints in(kBatch * kHeads * kSeq * kWidth);
  for (int32_t& x : in) x = static_cast<int32_t>(rng());
  Mask mask(kBatch * kSeq);
  for (int s = 0; s < kSeq; ++s) {
    mask[static_cast<size_t>(s)] = 1;                              // row 0: all
    mask[static_cast<size_t>(2 * kSeq + s)] = s % 3 == 0 ? 5 : 0;  // row 1: none
  }
  Ints out(in.size(), -7), idx(kBatch * kSeq), counts(kBatch);
  const size_t row_bytes = kWidth * sizeof(int32_t);
  ASSERT_TRUE(BoolGatherLeftPadCpu({.in = in.data(),
                                    .mask = mask.data(),
                                    .out = out.data(),
                                    .idx = idx.data(),
                                    .counts = counts.data(),
                                    .batch = kBatch,
                                    .num_heads = kHeads,
                                    .seq = kSeq,
                                    .row_bytes = row_bytes})
                  .ok());
  EXPECT_EQ(counts, (Ints{9, 0, 3}));
  // Scatter has no heads: repeat each row's index for both of them.
  Ints head_idx, head_lens;
  for (int b = 0; b < kBatch; ++b) {
    for (int h = 0; h < kHeads; ++h) {
      head_idx.insert(head_idx.end(), idx.begin() + b * kSeq, idx.begin() + (b + 1) * kSeq);
      head_lens.push_back(counts[static_cast<size_t>(b)]);
    }
  }
  Ints back(in.size(), -7);
  ASSERT_TRUE(ScatterByIndexCpu({.in = out.data(),
                                 .idx = head_idx.data(),
                                 .lens = head_lens.data(),
                                 .out = back.data(),
                                 .batch = kBatch * kHeads,
                                 .in_seq = kSeq,
                                 .out_seq = kSeq,
                                 .max_len = kSeq,
                                 .row_bytes = row_bytes})
                  .ok());
  for (size_t i = 0; i < in.size(); ++i) {
    const size_t s = i / kWidth % kSeq, b = i / (kWidth * kSeq * kHeads);
    ASSERT_EQ(back[i], mask[b * kSeq + s] != 0 ? in[i] : 0) << i;
  }
}

TEST(ScatterByIndex, BadIndicesAreNamed) {
  const Ints in = {1, 2, 3}, lens = {2};
  Ints out(3);
  const auto code = [&](Ints idx, Ints lengths) {
    return ScatterByIndexCpu({.in = in.data(),
                              .idx = idx.data(),
                              .lens = lengths.data(),
                              .out = out.data(),
                              .batch = 1,
                              .in_seq = 3,
                              .out_seq = 3,
                              .max_len = 2,
                              .row_bytes = 4})
        .code();
  };
  EXPECT_EQ(code({0, 2}, {2}), absl::StatusCode::kOk);
  EXPECT_EQ(code({0, 3}, {2}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({-1, 0}, {2}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({0, 3}, {1}), absl::StatusCode::kOk);  // unread
  EXPECT_EQ(code({0, 1}, {3}), absl::StatusCode::kInvalidArgument);
}

TEST(CompactByBool, Golden) {
  const Ints in = {10, 11, 12, 13, 14, 20, 21, 22, 23, 24};
  const Mask mask = {0, 1, 1, 0, 1, 0, 0, 0, 0, 0};
  Ints out(10, -7), counts(2, -7);
  ASSERT_TRUE(CompactByBoolCpu({.in = in.data(),
                                .mask = mask.data(),
                                .out = out.data(),
                                .counts = counts.data(),
                                .num_rows = 2,
                                .seq = 5,
                                .row_bytes = 4})
                  .ok());
  EXPECT_EQ(out, (Ints{11, 12, 14, 13, 14, 20, 21, 22, 23, 24}));
  EXPECT_EQ(counts, (Ints{3, 0}));
}

TEST(KeyState, ShiftsBitsAndMarksPadding) {
  constexpr auto K = KeyState::kKeep, E = KeyState::kEvict, P = KeyState::kPadding;
  const Mask decisions = {1, 1, 0, 1, /**/ 0, 0, 1, 1, /**/ 1, 1, 1, 1};
  const Mask old_evicted = {0, 1, 0, /**/ 1, 0, 0, /**/ 0, 0, 0};
  const Ints old_lens = {3, 2, 0}, new_lens = {4, 2, 0};
  std::vector<KeyState> state(3 * 7, P);
  ASSERT_TRUE(KeyStateCpu({.new_decisions = decisions.data(),
                           .old_evicted = old_evicted.data(),
                           .old_lens = old_lens.data(),
                           .new_lens = new_lens.data(),
                           .state = state.data(),
                           .num_rows = 3,
                           .old_seq = 3,
                           .new_seq = 4})
                  .ok());
  EXPECT_EQ(state, (std::vector<KeyState>{K,      E, E, E, K, E, K, /**/ P, K, E, P, P, E, K,
                                          /**/ P, P, P, P, P, P, P}));
  // Nothing cached yet.
  ASSERT_TRUE(KeyStateCpu({.new_decisions = decisions.data(),
                           .new_lens = new_lens.data(),
                           .state = state.data(),
                           .num_rows = 1,
                           .new_seq = 4})
                  .ok());
  EXPECT_EQ(std::vector<KeyState>(state.begin(), state.begin() + 4),
            (std::vector<KeyState>{E, K, E, K}));
  const Ints too_long = {5};
  EXPECT_EQ(KeyStateCpu({.new_decisions = decisions.data(),
                         .new_lens = too_long.data(),
                         .state = state.data(),
                         .num_rows = 1,
                         .new_seq = 4})
                .code(),
            absl::StatusCode::kInvalidArgument);
}

// The fused prefill, [old | new] left padded, against the mask written down again.
struct FusedCase {
  const char* name;
  int old_seq, new_seq, window, pad_old, pad_new, group;
  double evict;
  friend void PrintTo(const FusedCase& c, std::ostream* os) { *os << c.name; }
};

const FusedCase kFusedCases[] = {
    {"fresh", 0, 65, 5, 0, 0, 2, 0.5},
    {"one_token", 0, 1, 1, 0, 0, 1, 0.5},
    {"padded_in_window", 0, 64, 5, 0, 3, 4, 0.5},
    {"padded_far", 0, 90, 7, 0, 70, 1, 0.9},
    {"with_old", 33, 40, 8, 6, 0, 2, 0.5},
    {"all_kept", 20, 30, 4, 0, 0, 2, 0.0},
    {"all_evicted", 20, 30, 4, 0, 0, 2, 1.0},
    {"window_0", 10, 30, 0, 0, 0, 1, 0.5},
};

class FusedPrefill : public testing::TestWithParam<FusedCase> {};

TEST_P(FusedPrefill, MatchesTheMask) {
  const FusedCase& c = GetParam();
  constexpr int kBatch = 2, kKvHeads = 2, kDim = 24;  // no power of two
  const int heads = kKvHeads * c.group, keys = c.old_seq + c.new_seq;
  std::mt19937 rng(9);
  std::normal_distribution<float> normal;
  const auto fill = [&](int n) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& value : x) value = normal(rng);
    return x;
  };
  const auto q = fill(kBatch * heads * c.new_seq * kDim);
  const auto k = fill(kBatch * kKvHeads * keys * kDim);
  const auto v = fill(kBatch * kKvHeads * keys * kDim);
  std::vector<KeyState> state(static_cast<size_t>(kBatch * kKvHeads * keys));
  for (size_t i = 0; i < state.size(); ++i) {
    const int n = static_cast<int>(i) % keys;
    const bool pad = n < c.pad_old || (n >= c.old_seq && n < c.old_seq + c.pad_new);
    const bool evict = std::uniform_real_distribution<double>()(rng) < c.evict;
    state[i] = pad ? KeyState::kPadding : evict ? KeyState::kEvict : KeyState::kKeep;
  }
  std::vector<float> out(q.size(), NAN);
  ASSERT_TRUE(DmsFusedPrefillCpu({.q = q.data(),
                                  .k = k.data(),
                                  .v = v.data(),
                                  .state = state.data(),
                                  .out = out.data(),
                                  .batch = kBatch,
                                  .num_heads = heads,
                                  .num_kv_heads = kKvHeads,
                                  .old_seq = c.old_seq,
                                  .new_seq = c.new_seq,
                                  .head_dim = kDim,
                                  .window = c.window,
                                  .scale = 0.25f})
                  .ok());
  for (int b = 0; b < kBatch; ++b) {
    for (int h = 0; h < heads; ++h) {
      const int bg = b * kKvHeads + h / c.group;
      for (int m = 0; m < c.new_seq; ++m) {
        std::vector<double> sum(kDim, 0.0);
        double total = 0.0;
        for (int n = 0; n < keys; ++n) {
          const int distance = c.old_seq + m - n;
          const KeyState s = state[static_cast<size_t>(bg * keys + n)];
          if (distance < 0 || s == KeyState::kPadding) continue;
          if (distance > c.window && s == KeyState::kEvict) continue;
          double dot = 0.0;
          for (int d = 0; d < kDim; ++d) {
            dot += double{q[static_cast<size_t>(((b * heads + h) * c.new_seq + m) * kDim + d)]} *
                   double{k[static_cast<size_t>((bg * keys + n) * kDim + d)]};
          }
          const double p = std::exp(dot * 0.25);
          total += p;
          for (int d = 0; d < kDim; ++d) {
            sum[static_cast<size_t>(d)] +=
                p * double{v[static_cast<size_t>((bg * keys + n) * kDim + d)]};
          }
        }
        for (int d = 0; d < kDim; ++d) {
          const double want = total == 0.0 ? 0.0 : sum[static_cast<size_t>(d)] / total;
          const size_t at =
              static_cast<size_t>(((bg * c.new_seq + m) * c.group + h % c.group) * kDim + d);
          ASSERT_NEAR(out[at], want, 2e-5) << "batch " << b << " head " << h << " query " << m;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, FusedPrefill, testing::ValuesIn(kFusedCases),
                         [](const auto& c) { return std::string(c.param.name); });

}  // namespace
}  // namespace winnow::kernels
