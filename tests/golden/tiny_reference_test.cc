// Logits of two tiny random checkpoints against transformers' (scripts/make_goldens.py).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/model/run_model.h"
#include "tests/testing/test_data.h"

namespace winnow::testing {
namespace {

using nlohmann::json;

class TinyReference : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    golden_ = json::parse(ReadWholeFile("tests/golden/" + GetParam() + ".json"));
    model_ = MustLoad("tests/golden/" + GetParam());
    ASSERT_NE(model_, nullptr);
  }

  json golden_;
  std::unique_ptr<Model> model_;
};

// The reference rounds K and V as the cache stores them, so what is left is the order of sums
// and the rounding that they tip over.
TEST_P(TinyReference, LogitsAreTheReferences) {
  Runner runner(model_.get(), {.kv_mode = "dense-bf16", .activations = ActivationType::kFloat32});
  const size_t vocab = static_cast<size_t>(runner.vocab());
  for (const json& sequence : golden_["sequences"]) {
    const auto ids = sequence["token_ids"].get<std::vector<int32_t>>();
    const std::vector<float> logits = runner.Logits(ids, 64);
    double largest = 0, difference = 0;
    size_t row = 0;
    for (const json& position : sequence["positions"]) {
      const auto expected = sequence["logits_bf16_kv"][row++].get<std::vector<float>>();
      ASSERT_EQ(expected.size(), vocab);
      for (size_t i = 0; i < vocab; ++i) {
        const double x = logits[position.get<size_t>() * vocab + i];
        ASSERT_TRUE(std::isfinite(x));
        largest = std::max(largest, std::abs(double{expected[i]}));
        difference = std::max(difference, std::abs(x - expected[i]));
      }
    }
    EXPECT_LE(difference, 1e-3 * largest) << ids.size() << " tokens, max |logit| " << largest;
    RecordProperty("relative_difference_" + std::to_string(ids.size()),
                   std::to_string(difference / largest));
  }
}

// All steps are checked, each after the reference's own tokens.
TEST_P(TinyReference, GreedyTokensAreTheReferences) {
  Runner runner(model_.get(), {.kv_mode = "dense-bf16", .activations = ActivationType::kFloat32});
  const json& greedy = golden_["greedy"];
  auto ids = greedy["prompt_ids"].get<std::vector<int32_t>>();
  const size_t prompt = ids.size(), vocab = static_cast<size_t>(runner.vocab());
  const auto expected = greedy["token_ids"].get<std::vector<int32_t>>();
  ids.insert(ids.end(), expected.begin(), expected.end());
  const std::vector<float> logits = runner.Logits(ids, 16);
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto row = logits.begin() + static_cast<ptrdiff_t>((prompt + i - 1) * vocab);
    const auto top = std::max_element(row, row + static_cast<ptrdiff_t>(vocab)) - row;
    if (greedy["margins"][i].get<double>() <= 0.15) continue;
    EXPECT_EQ(top, expected[i]) << "step " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Checkpoints, TinyReference, ::testing::Values("tiny_llama", "tiny_qwen3"),
                         [](const auto& param_info) { return param_info.param; });

}  // namespace
}  // namespace winnow::testing
