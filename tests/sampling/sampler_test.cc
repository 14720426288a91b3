#include "common/sampling/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "common/sampling/philox.h"
#include "common/sampling/sample_math.h"

namespace winnow {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int32_t MustSample(const std::vector<float>& logits, const SamplingParams& params,
                   const SampleKey& key) {
  const auto id = Sample(logits, params, key);
  EXPECT_TRUE(id.ok()) << id.status();
  return id.value_or(-1);
}

std::vector<float> RandomLogits(int vocab, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> logits(vocab);
  for (float& x : logits) x = normal(rng);
  return logits;
}

std::vector<int> Histogram(const std::vector<float>& logits, const SamplingParams& params,
                           int draws, uint64_t seed = 7) {
  std::vector<int> counts(logits.size(), 0);
  for (int i = 0; i < draws; ++i) {
    ++counts[MustSample(logits, params, {seed, static_cast<uint64_t>(i), 0})];
  }
  return counts;
}

// The known answers of the authors' Random123 library, kat_vectors, philox4x32 10.
TEST(PhiloxTest, KnownAnswers) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(SampleMathTest, WeightsAreTheExponentialRounded) {
  double powers[kNumSamplePowers];
  for (int j = 0; j < kNumSamplePowers; ++j) {
    powers[j] = SamplePower(j);
    EXPECT_EQ(powers[j], std::exp2(j / 16.0)) << j;
  }
  std::mt19937 rng(5);
  std::normal_distribution<float> normal(0.0f, 10.0f);
  for (const float temperature : {0.05f, 0.7f, 1.0f, 100.0f}) {
    const double scale = SampleScale(temperature);
    for (int i = 0; i < 20000; ++i) {
      const float max = normal(rng), logit = max - std::abs(normal(rng));
      const double want =
          std::ldexp(std::exp((double{logit} - double{max}) / double{temperature}), 43);
      // Half a unit of rounding, and what the series, its five roundings and t leave out.
      const double bound = 0.5 + 0x1p-42 * want;
      EXPECT_NEAR(static_cast<double>(SampleWeight(logit, max, scale, powers)), want, bound);
    }
    EXPECT_EQ(SampleWeight(3.0f, 3.0f, scale, powers), uint64_t{1} << 43);
    EXPECT_EQ(SampleWeight(-kInf, 3.0f, scale, powers), 0u);
    EXPECT_EQ(SampleWeight(-31.2f * temperature, 0.0f, scale, powers), 0u);
    EXPECT_EQ(SampleWeight(-29.9f * temperature, 0.0f, scale, powers), 1u);
  }
}

TEST(SampleMathTest, EnoughAndTargetStayInRange) {
  const uint64_t most = uint64_t{1} << 63;
  for (const uint64_t total : {uint64_t{1}, uint64_t{1} << 43, (uint64_t{1} << 53) + 1, most}) {
    EXPECT_EQ(SampleEnough(1e-45f, total), 1u);
    EXPECT_LE(SampleEnough(std::nextafter(1.0f, 0.0f), total), total);
    EXPECT_EQ(SampleTarget(0, total), 0u);
    EXPECT_EQ(SampleTarget(~uint64_t{0}, total), total - 1);
  }
  EXPECT_EQ(SampleEnough(0.5f, uint64_t{1} << 43), uint64_t{1} << 42);
}

TEST(SamplerTest, GreedyTakesTheLargestAndTheLowestIdAmongEquals) {
  EXPECT_EQ(MustSample({0.5f, 2.0f, -1.0f, 2.0f}, {}, {}), 1);
  EXPECT_EQ(MustSample({-kInf, -3.0f, -kInf}, {}, {}), 1);
  EXPECT_EQ(MustSample({0.0f, -0.0f}, {}, {}), 0);
  EXPECT_EQ(MustSample({-0.0f, 0.0f}, {}, {}), 0);
}

TEST(SamplerTest, GreedyIgnoresSeedTopKAndTopP) {
  const auto logits = RandomLogits(1000, 1);
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  for (uint64_t seed = 0; seed < 20; ++seed) {
    EXPECT_EQ(MustSample(logits, {.temperature = 0.0f, .top_k = 5, .top_p = 0.5f}, {seed, seed}),
              best);
  }
}

TEST(SamplerTest, WhatLeavesOneTokenIsGreedy) {
  for (uint32_t i = 0; i < 50; ++i) {
    const auto logits = RandomLogits(257, i);
    const int32_t best = MustSample(logits, {}, {});
    EXPECT_EQ(MustSample(logits, {.temperature = 1.0f, .top_k = 1}, {i, i}), best);
    EXPECT_EQ(MustSample(logits, {.temperature = 100.0f, .top_p = 1e-30f}, {i, i}), best);
    EXPECT_EQ(MustSample(logits, {.temperature = 1e-38f}, {i, i}), best);
  }
}

TEST(SamplerTest, TopKKeepsExactlyKAndLowIdsAmongEquals) {
  const std::vector<float> logits = {1.0f, 3.0f, 1.0f, 2.0f, 1.0f, -kInf};
  const auto counts = Histogram(logits, {.temperature = 2.0f, .top_k = 3}, 500);
  EXPECT_GT(counts[0], 0);
  EXPECT_GT(counts[1], 0);
  EXPECT_GT(counts[3], 0);
  EXPECT_EQ(counts[2] + counts[4] + counts[5], 0);
}

TEST(SamplerTest, TopPKeepsTheSmallestSetThatReachesIt) {
  const std::vector<float> equal(4, 1.5f);  // probabilities exactly 1/4
  const auto kept = [&](float top_p) {
    const auto counts = Histogram(equal, {.temperature = 1.0f, .top_p = top_p}, 400);
    for (size_t i = 1; i < counts.size(); ++i) {
      EXPECT_LE(counts[i] > 0, counts[i - 1] > 0) << "a lower id must be kept first";
    }
    return std::count_if(counts.begin(), counts.end(), [](int c) { return c > 0; });
  };
  EXPECT_EQ(kept(0.01f), 1);
  EXPECT_EQ(kept(0.25f), 1);
  EXPECT_EQ(kept(0.26f), 2);
  EXPECT_EQ(kept(0.5f), 2);
  EXPECT_EQ(kept(0.75f), 3);
  EXPECT_EQ(kept(0.76f), 4);
  EXPECT_EQ(kept(1.0f), 4);
}

// Top-p counts what top-k has left, as vLLM and transformers do: of {1/2, 1/4, 1/4},
// top_k = 2 leaves {2/3, 1/3}, of which 0.6 needs one and 0.7 both.
TEST(SamplerTest, TopPFollowsTopK) {
  const std::vector<float> logits = {std::log(2.0f), 0.0f, 0.0f};
  const auto narrow = Histogram(logits, {.temperature = 1.0f, .top_k = 2, .top_p = 0.6f}, 300);
  EXPECT_EQ(narrow, (std::vector<int>{300, 0, 0}));
  const auto wide = Histogram(logits, {.temperature = 1.0f, .top_k = 2, .top_p = 0.7f}, 300);
  EXPECT_GT(wide[1], 50);
  EXPECT_EQ(wide[2], 0);
}

// And temperature comes before both: flattened, 0.6 no longer fits in one token.
TEST(SamplerTest, TopPFollowsTemperature) {
  const std::vector<float> logits = {std::log(4.0f), 0.0f};
  EXPECT_EQ(Histogram(logits, {.temperature = 1.0f, .top_p = 0.7f}, 300)[1], 0);
  EXPECT_GT(Histogram(logits, {.temperature = 2.0f, .top_p = 0.7f}, 300)[1], 50);
}

// Chi-square against the exact probabilities, 64 tokens, 60,000 draws. The bound is
// mean + 5 standard deviations of chi-square with k - 1 degrees of freedom; the seed
// is fixed, so this does not flicker.
void ExpectDistribution(const SamplingParams& params) {
  const auto logits = RandomLogits(64, 3);
  std::vector<int> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  if (params.top_k > 0) order.resize(params.top_k);
  std::vector<double> p(logits.size(), 0.0);
  double total = 0.0;
  for (int id : order) total += p[id] = std::exp(double{logits[id]} / params.temperature);
  double kept = 0.0;
  size_t n = 0;
  while (n < order.size() && kept < params.top_p * total) kept += p[order[n++]];
  for (size_t i = n; i < order.size(); ++i) p[order[i]] = 0.0;

  constexpr int kDraws = 60000;
  const auto counts = Histogram(logits, params, kDraws);
  double chi2 = 0.0;
  for (size_t id = 0; id < p.size(); ++id) {
    if (p[id] == 0.0) {
      EXPECT_EQ(counts[id], 0) << "token " << id << " is outside the kept set";
      continue;
    }
    const double expected = kDraws * p[id] / kept;
    chi2 += (counts[id] - expected) * (counts[id] - expected) / expected;
  }
  const double freedom = static_cast<double>(n) - 1.0;
  EXPECT_LT(chi2, freedom + 5.0 * std::sqrt(2.0 * freedom)) << n << " tokens kept";
}

TEST(SamplerTest, DistributionPlain) { ExpectDistribution({.temperature = 1.0f}); }
TEST(SamplerTest, DistributionHot) { ExpectDistribution({.temperature = 3.0f}); }
TEST(SamplerTest, DistributionTopK) { ExpectDistribution({.temperature = 1.0f, .top_k = 10}); }
TEST(SamplerTest, DistributionTopP) { ExpectDistribution({.temperature = 1.5f, .top_p = 0.9f}); }
TEST(SamplerTest, DistributionAll) {
  ExpectDistribution({.temperature = 1.5f, .top_k = 20, .top_p = 0.8f});
}

// Sorting only as far as needed must not change what is chosen: over a vocabulary that
// needs several rounds of it, the choice for each key equals a plain sort and walk.
TEST(SamplerTest, EqualsASortAndAWalk) {
  const auto logits = RandomLogits(5000, 11);
  std::vector<int32_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  const float temperature = 2.5f;
  double total = 0.0;
  const auto weight = [&](int32_t id) {
    return std::exp((double{logits[id]} - logits[order[0]]) / temperature);
  };
  for (int32_t id = 0; id < 5000; ++id) total += weight(id);
  std::set<int32_t> seen;
  for (uint64_t position = 0; position < 300; ++position) {
    const auto words = Philox4x32({static_cast<uint32_t>(position), 0, 4, 0}, {99, 1});
    const double u = static_cast<double>((uint64_t{words[0]} << 32 | words[1]) >> 11) * 0x1p-53;
    double sum = 0.0;
    size_t i = 0;
    while (i < order.size() && (sum += weight(order[i])) <= u * total) ++i;
    const uint64_t seed = (uint64_t{1} << 32) | 99;
    const int32_t id = MustSample(logits, {.temperature = temperature}, {seed, position, 4});
    EXPECT_EQ(id, order[i]) << "position " << position;
    seen.insert(id);
  }
  EXPECT_GT(seen.size(), 100u);
}

TEST(SamplerTest, EveryPartOfTheKeyCounts) {
  const std::vector<float> logits(1000, 0.0f);
  const SamplingParams params = {.temperature = 1.0f};
  const auto stream = [&](uint64_t seed, uint64_t first, uint32_t sample) {
    std::vector<int32_t> ids;
    for (uint64_t i = 0; i < 32; ++i)
      ids.push_back(MustSample(logits, params, {seed, first + i, sample}));
    return ids;
  };
  const auto base = stream(1, 0, 0);
  EXPECT_EQ(stream(1, 0, 0), base);
  std::set<std::vector<int32_t>> all = {base};
  EXPECT_TRUE(all.insert(stream(2, 0, 0)).second);
  EXPECT_TRUE(all.insert(stream(uint64_t{1} << 32, 0, 0)).second);
  EXPECT_TRUE(all.insert(stream(1, uint64_t{1} << 32, 0)).second);
  EXPECT_TRUE(all.insert(stream(1, 0, 1)).second);
  EXPECT_EQ(stream(1, 1, 0)[0], base[1]) << "the position alone decides, not the call's number";
}

TEST(SamplerTest, NamesWhatIsOutOfRange) {
  const std::vector<float> logits = {1.0f, 2.0f};
  const auto message = [&](const SamplingParams& params) {
    const auto id = Sample(logits, params, {});
    EXPECT_EQ(id.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ValidateSamplingParams(params, 2), id.status());
    return std::string(id.status().message());
  };
  EXPECT_EQ(message({.temperature = -1.0f}), "temperature=-1 is outside [0, 100]");
  EXPECT_EQ(message({.temperature = 100.5f}), "temperature=100.5 is outside [0, 100]");
  EXPECT_EQ(message({.temperature = kNan}), "temperature=nan is outside [0, 100]");
  EXPECT_EQ(message({.temperature = kInf}), "temperature=inf is outside [0, 100]");
  EXPECT_EQ(message({.top_k = -1}), "top_k=-1 is outside [0, 2]");
  EXPECT_EQ(message({.top_k = 3}), "top_k=3 is outside [0, 2]");
  EXPECT_EQ(message({.top_p = 0.0f}), "top_p=0 is outside (0, 1]");
  EXPECT_EQ(message({.top_p = 1.5f}), "top_p=1.5 is outside (0, 1]");
  EXPECT_EQ(message({.top_p = kNan}), "top_p=nan is outside (0, 1]");
  EXPECT_TRUE(ValidateSamplingParams({.temperature = 100.0f, .top_k = 2, .top_p = 1.0f}, 2).ok());
}

TEST(SamplerTest, RubbishLogitsAreAnErrorByName) {
  for (const float temperature : {0.0f, 1.0f}) {
    const auto message = [&](const std::vector<float>& logits) {
      const auto id = Sample(logits, {.temperature = temperature}, {});
      EXPECT_EQ(id.status().code(), absl::StatusCode::kInternal);
      return std::string(id.status().message());
    };
    EXPECT_EQ(message({1.0f, 2.0f, kNan, kNan}), "the logit of token 2 is nan");
    EXPECT_EQ(message({1.0f, kInf}), "the logit of token 1 is inf");
    EXPECT_EQ(message({-kInf, -kInf}), "all 2 logits are -inf");
    EXPECT_EQ(message({}), "there are no logits");
  }
}

TEST(SamplerTest, MinusInfinityIsNeverChosen) {
  const std::vector<float> logits = {-kInf, 0.0f, -kInf, 0.0f};
  const auto counts = Histogram(logits, {.temperature = 100.0f, .top_k = 4, .top_p = 0.99f}, 200);
  EXPECT_EQ(counts[0] + counts[2], 0);
  EXPECT_GT(counts[1], 0);
  EXPECT_GT(counts[3], 0);
}

}  // namespace
}  // namespace winnow
