// SmolLM2 against transformers in float32 on the same BF16 weights (scripts/make_goldens.py).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/model/run_model.h"
#include "tests/testing/test_data.h"

namespace winnow::testing {
namespace {

using Json = nlohmann::json;

constexpr double kTie = 0.15;  // top-2 margin of the golden's logits

class SmolLm2Golden : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto dir = DefaultModelDir();
    if (!dir) GTEST_SKIP() << "needs SmolLM2";
    model_ = MustLoad(*dir);
    ASSERT_NE(model_, nullptr);
  }

  static Json Read(const std::string& name) {
    return Json::parse(ReadWholeFile("tests/golden/" + name), nullptr, false);
  }

  std::unique_ptr<Model> model_;
};

TEST_F(SmolLm2Golden, GreedyTokensOfTenPrompts) {
  const Json golden = Read("smollm2_greedy.json");
  Runner run(
      model_.get(),
      {.threads = 2, .max_tokens = 512, .budget_bytes = size_t{128} << 20, .max_positions = 2048});
  const size_t vocab = static_cast<size_t>(run.vocab());
  int whole = 0;
  for (const Json& prompt : golden["prompts"]) {
    std::vector<int32_t> next = prompt["prompt_ids"].get<std::vector<int32_t>>();
    const auto expected = prompt["token_ids"].get<std::vector<int32_t>>();
    const auto margins = prompt["margins"].get<std::vector<double>>();
    ASSERT_EQ(expected.size(), 64u);
    SequenceCache sequence = run.NewSequence();
    size_t i = 0;
    for (; i < expected.size(); ++i) {
      const std::vector<float> logits = run.Logits(&sequence, next, 512);
      const float* last = logits.data() + logits.size() - vocab;
      const int top = static_cast<int>(std::max_element(last, last + vocab) - last);
      if (top != expected[i]) {
        EXPECT_LE(margins[i], kTie)
            << prompt["prompt"] << ": token " << i << " is " << top << ", not " << expected[i];
        break;
      }
      next = {top};
    }
    whole += i == expected.size() ? 1 : 0;
  }
  EXPECT_GE(whole, 3);  // or the tie rule would hide a wrong model
}

TEST_F(SmolLm2Golden, LikelihoodOfEnglishText) {
  const Json golden = Read("smollm2_text.json");
  Runner run(model_.get(), {.threads = 2,
                            .max_tokens = 512,
                            .activations = ActivationType::kFloat32,
                            .budget_bytes = size_t{128} << 20,
                            .max_positions = 2048});
  const auto tokens = golden["token_ids"].get<std::vector<int32_t>>();
  const auto nll = golden["nll"].get<std::vector<double>>();
  const size_t vocab = static_cast<size_t>(run.vocab());
  SequenceCache sequence = run.NewSequence();
  double sum = 0, kld = 0;
  size_t next_top = 0, tops = 0;
  constexpr size_t kChunk = 256;
  for (size_t begin = 0; begin < tokens.size(); begin += kChunk) {
    const auto piece = absl::MakeConstSpan(tokens).subspan(begin, kChunk);
    const std::vector<float> rows = run.Logits(&sequence, piece, kChunk);
    for (size_t i = 0; i < piece.size() && begin + i + 1 < tokens.size(); ++i) {
      const float* row = rows.data() + i * vocab;
      const double max = *std::max_element(row, row + vocab);
      double total = 0;
      for (size_t t = 0; t < vocab; ++t) total += std::exp(row[t] - max);
      const double log_sum = max + std::log(total);
      sum += log_sum - row[tokens[begin + i + 1]];
      const Json& top = golden["top"][std::min(next_top, golden["top"].size() - 1)];
      if (top["position"] != begin + i) continue;
      // Over the golden's most likely tokens: all but a sliver of the probability. The
      // rest of both is one more outcome.
      double rest = 1, our_rest = 1;
      for (size_t j = 0; j < top["ids"].size(); ++j) {
        const double log_p = top["logprobs"][j].get<double>();
        const double log_q = row[top["ids"][j].get<size_t>()] - log_sum;
        kld += std::exp(log_p) * (log_p - log_q);
        rest -= std::exp(log_p);
        our_rest -= std::exp(log_q);
      }
      if (rest > 1e-4 && our_rest > 1e-4) kld += rest * std::log(rest / our_rest);
      ++next_top;
      ++tops;
    }
  }
  ASSERT_EQ(tops, golden["top"].size());
  EXPECT_NEAR(sum / static_cast<double>(nll.size()), golden["mean_nll"].get<double>(), 1e-3);
  EXPECT_LE(kld / static_cast<double>(tops), 1e-4);
  RecordProperty("mean_nll", std::to_string(sum / static_cast<double>(nll.size())));
  RecordProperty("kld", std::to_string(kld / static_cast<double>(tops)));
}

// What a tiny model shows for all modes, here for a real one.
TEST_F(SmolLm2Golden, ChunksAndThreadsChangeNoBit) {
  const auto all = Read("smollm2_text.json")["token_ids"].get<std::vector<int32_t>>();
  const auto adapter = SharedDataPath("smollm2_dms_probe/dms_adapter.safetensors");
  std::unique_ptr<Model> dms;
  if (adapter) {
    dms = MustLoad(*DefaultModelDir(), std::filesystem::path(*adapter).parent_path());
  }
  for (const char* mode : {"dense-bf16", "dense-fp8", "dms-bf16", "dms-fp8"}) {
    const bool is_dms = std::string(mode).rfind("dms", 0) == 0;
    if (is_dms && dms == nullptr) continue;
    // Past the window of 256, so that something is evicted, and past a chunk of 512.
    constexpr int kTokens = 530, kCompared = 16;
    const auto tokens = absl::MakeConstSpan(all).first(kTokens);
    std::vector<float> expected;
    for (const auto& [threads, chunk] :
         {std::pair(1, kTokens), {2, kTokens}, {1, 512}, {2, 64}, {2, 7}, {2, 1}}) {
      Runner run(is_dms ? dms.get() : model_.get(), {.kv_mode = mode,
                                                     .threads = threads,
                                                     .max_tokens = kTokens,
                                                     .budget_bytes = size_t{64} << 20,
                                                     .max_positions = 1024});
      // The last rows alone are compared: they depend on all before.
      SequenceCache sequence = run.NewSequence();
      const std::vector<float> tail = run.LastLogits(&sequence, tokens, chunk, kCompared);
      if (expected.empty()) expected = tail;
      EXPECT_TRUE(tail == expected) << mode << ", " << threads << " threads, chunks of " << chunk;
    }
  }
}

}  // namespace
}  // namespace winnow::testing
