// Against transformers, in float32 on the same BF16 weights: tests/golden, made by
// scripts/make_goldens.py. The cache stores K and V in BF16, as the golden's
// logits_bf16_kv do.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <ostream>

#include "tests/model/run_model.h"
#include "tests/testing/test_data.h"

namespace winnow::testing {
namespace {

using Json = nlohmann::json;

Json ReadGolden(const std::string& name) {
  Json json = Json::parse(ReadWholeFile("tests/golden/" + name), nullptr, false);
  EXPECT_TRUE(json.is_object()) << name;
  return json;
}

int Top(absl::Span<const float> logits) {
  return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Greedy decoding, checked against the golden's tokens up to the first that differ, which
// must be a tie there.
void ExpectGreedy(Runner* run, const Json& golden, double tie) {
  std::vector<int32_t> tokens = golden["prompt_ids"].get<std::vector<int32_t>>();
  const auto expected = golden["token_ids"].get<std::vector<int32_t>>();
  const auto margins = golden["margins"].get<std::vector<double>>();
  ASSERT_EQ(expected.size(), margins.size());
  const size_t vocab = static_cast<size_t>(run->vocab());
  SequenceCache sequence = run->NewSequence();
  std::vector<float> logits = run->Logits(&sequence, tokens, 512);
  for (size_t i = 0; i < expected.size(); ++i) {
    const int top = Top(absl::MakeConstSpan(logits).last(vocab));
    if (top != expected[i]) {
      EXPECT_LE(margins[i], tie) << "token " << i << " is " << top << ", not " << expected[i];
      return;
    }
    logits = run->Logits(&sequence, {top}, 1);
  }
}

class TinyGolden : public ::testing::TestWithParam<const char*> {};

TEST_P(TinyGolden, LogitsAndGreedyTokens) {
  const std::string name = GetParam();
  const Json golden = ReadGolden(name + ".json");
  const auto model = MustLoad("tests/golden/" + name);
  ASSERT_NE(model, nullptr);
  Runner run(model.get(), {.activations = ActivationType::kFloat32});
  const size_t vocab = static_cast<size_t>(run.vocab());
  size_t compared = 0;
  for (const Json& sequence : golden["sequences"]) {
    const auto tokens = sequence["token_ids"].get<std::vector<int32_t>>();
    const std::vector<float> logits = run.Logits(tokens, 512);
    const auto positions = sequence["positions"].get<std::vector<size_t>>();
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto row = sequence["logits_bf16_kv"][i].get<std::vector<float>>();
      ASSERT_EQ(row.size(), vocab);
      float max = 0.0f;
      for (float x : row) max = std::max(max, std::abs(x));
      for (size_t t = 0; t < vocab; ++t, ++compared) {
        ASSERT_NEAR(logits[positions[i] * vocab + t], row[t], 1e-3 * max)
            << tokens.size() << " tokens, position " << positions[i] << ", id " << t;
      }
    }
  }
  EXPECT_GT(compared, 0u);
  ExpectGreedy(&run, golden["greedy"], 0.05);
}

INSTANTIATE_TEST_SUITE_P(Models, TinyGolden, ::testing::Values("tiny_llama", "tiny_qwen3"),
                         [](const auto& c) { return std::string(c.param); });

}  // namespace
}  // namespace winnow::testing
