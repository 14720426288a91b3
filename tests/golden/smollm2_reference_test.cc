// SmolLM2-135M-Instruct against transformers in float32 (scripts/make_goldens.py).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "common/tokenizer/chat_template.h"
#include "common/tokenizer/tokenizer.h"
#include "tests/model/run_model.h"
#include "tests/testing/test_data.h"

namespace winnow::testing {
namespace {

using nlohmann::json;

constexpr int kChunk = 128;
// Where the reference's two best logits are this near, either is right.
constexpr double kTie = 0.15;

class Smollm2Reference : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto dir = DefaultModelDir();
    if (!dir) GTEST_SKIP() << "needs SmolLM2";
    dir_ = *dir;
    model_ = MustLoad(dir_);
    ASSERT_NE(model_, nullptr);
  }

  RunOptions Options(ActivationType activations) const {
    return {.kv_mode = "dense-bf16",
            .threads = 2,
            .max_tokens = kChunk,
            .activations = activations,
            .budget_bytes = size_t{128} << 20,
            .max_positions = 2048};
  }

  // Every step of every prompt, each after the reference's own tokens.
  void CheckGreedy(ActivationType activations) {
    const json golden = json::parse(ReadWholeFile("tests/golden/smollm2_greedy.json"));
    Runner runner(model_.get(), Options(activations));
    const size_t vocab = static_cast<size_t>(runner.vocab());
    ASSERT_EQ(golden["prompts"].size(), 10u);
    for (const json& prompt : golden["prompts"]) {
      SCOPED_TRACE(prompt["prompt"].get<std::string>().substr(0, 40));
      auto ids = prompt["prompt_ids"].get<std::vector<int32_t>>();
      const size_t start = ids.size();
      const auto expected = prompt["token_ids"].get<std::vector<int32_t>>();
      ASSERT_EQ(expected.size(), 64u);
      ids.insert(ids.end(), expected.begin(), expected.end());
      const std::vector<float> logits = runner.Logits(ids, kChunk);
      for (size_t i = 0; i < expected.size(); ++i) {
        if (prompt["margins"][i].get<double>() <= kTie) continue;
        const auto row = logits.begin() + static_cast<ptrdiff_t>((start + i - 1) * vocab);
        const auto top = std::max_element(row, row + static_cast<ptrdiff_t>(vocab)) - row;
        EXPECT_EQ(top, expected[i]) << "step " << i << ", margin " << prompt["margins"][i];
      }
    }
  }

  std::string dir_;
  std::unique_ptr<Model> model_;
};

TEST_F(Smollm2Reference, PromptsHaveTheReferencesIds) {
  const json golden = json::parse(ReadWholeFile("tests/golden/smollm2_greedy.json"));
  const auto tokenizer = Tokenizer::Load(dir_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto chat_template = ChatTemplate::Load(dir_);
  ASSERT_TRUE(chat_template.ok()) << chat_template.status();
  for (const json& prompt : golden["prompts"]) {
    std::string text = prompt["prompt"];
    const bool chat = prompt["chat"];
    if (chat) {
      const auto rendered = chat_template->Apply({{{"user", text}}}, true);
      ASSERT_TRUE(rendered.ok()) << rendered.status();
      text = *rendered;
    }
    const auto ids = (*tokenizer)->Encode(text, chat);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, prompt["prompt_ids"].get<std::vector<int32_t>>()) << text;
  }
}

TEST_F(Smollm2Reference, GreedyTokensWithFloat32Activations) {
  CheckGreedy(ActivationType::kFloat32);
}

TEST_F(Smollm2Reference, GreedyTokensAsServed) { CheckGreedy(ActivationType::kBf16); }

TEST_F(Smollm2Reference, TextHasTheReferencesLikelihoods) {
  const json golden = json::parse(ReadWholeFile("tests/golden/smollm2_text.json"));
  const auto ids = golden["token_ids"].get<std::vector<int32_t>>();
  Runner runner(model_.get(), Options(ActivationType::kFloat32));
  SequenceCache sequence = runner.NewSequence();
  const size_t vocab = static_cast<size_t>(runner.vocab());
  std::map<size_t, json> tops;
  for (const json& top : golden["top"]) tops[top["position"].get<size_t>()] = top;
  double sum_nll = 0, sum_kld = 0, largest = 0;
  for (size_t begin = 0; begin < ids.size(); begin += kChunk) {
    const auto piece = absl::MakeConstSpan(ids).subspan(begin, kChunk);
    const std::vector<float> logits = runner.Logits(&sequence, piece, kChunk);
    for (size_t i = 0; i < piece.size() && begin + i + 1 < ids.size(); ++i) {
      const float* row = logits.data() + i * vocab;
      const double max = *std::max_element(row, row + vocab);
      double total = 0;
      for (size_t t = 0; t < vocab; ++t) total += std::exp(row[t] - max);
      const double log_total = max + std::log(total);
      const double nll = log_total - row[ids[begin + i + 1]];
      sum_nll += nll;
      largest = std::max(largest, std::abs(nll - golden["nll"][begin + i].get<double>()));
      const auto top = tops.find(begin + i);
      if (top == tops.end()) continue;
      // KL over the reference's 64 best tokens and one bucket for all others.
      double rest_p = 1, rest_q = 1;
      for (size_t k = 0; k < top->second["ids"].size(); ++k) {
        const double log_p = top->second["logprobs"][k];
        const double log_q = row[top->second["ids"][k].get<size_t>()] - log_total;
        sum_kld += std::exp(log_p) * (log_p - log_q);
        rest_p -= std::exp(log_p);
        rest_q -= std::exp(log_q);
      }
      if (rest_p > 1e-6) sum_kld += rest_p * std::log(rest_p / std::max(rest_q, 1e-9));
    }
  }
  const double mean_nll = sum_nll / static_cast<double>(ids.size() - 1);
  EXPECT_NEAR(mean_nll, golden["mean_nll"].get<double>(), 1e-3);
  const double kld = sum_kld / static_cast<double>(tops.size());
  EXPECT_LE(kld, 1e-4);
  EXPECT_LE(largest, 0.25);
  RecordProperty("mean_nll", std::to_string(mean_nll));
  RecordProperty("kld", std::to_string(kld));
  RecordProperty("largest_nll_difference", std::to_string(largest));
  std::printf("mean NLL %.5f (reference %.5f), KLD %.2e, largest difference %.3f\n", mean_nll,
              golden["mean_nll"].get<double>(), kld, largest);
}

}  // namespace
}  // namespace winnow::testing
