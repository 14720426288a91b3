// SmolLM2 with the probe adapter of ../shared/data/smollm2_dms_probe on its golden text.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "common/tokenizer/tokenizer.h"
#include "tests/model/run_model.h"
#include "tests/testing/test_data.h"

namespace winnow::testing {
namespace {

constexpr int kChunk = 256;

class ProbeAdapter : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto model_dir = DefaultModelDir();
    const auto adapter = SharedDataPath("smollm2_dms_probe/dms_adapter.safetensors");
    const auto golden = SharedDataPath("smollm2_dms_probe/golden_wiki_2048.json");
    const auto wiki = SharedDataPath("wiki.test.raw");
    if (!model_dir || !adapter || !golden || !wiki) GTEST_SKIP() << "needs SmolLM2 and its probe";
    golden_ = nlohmann::json::parse(ReadWholeFile(*golden))[0];
    const auto tokenizer = Tokenizer::Load(*model_dir);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    // Ample for 2048 tokens, and it ends in a whole character.
    const auto ids = (*tokenizer)->Encode(ReadWholeFile(*wiki).substr(0, 20000), false);
    ASSERT_TRUE(ids.ok()) << ids.status();
    tokens_.assign(ids->begin(), ids->begin() + golden_["tokens"].get<int>());
    const auto first_ids = golden_["first_ids"].get<std::vector<int32_t>>();
    ASSERT_TRUE(std::equal(first_ids.begin(), first_ids.end(), tokens_.begin()));
    base_ = MustLoad(*model_dir);
    dms_ = MustLoad(*model_dir, std::filesystem::path(*adapter).parent_path());
    ASSERT_TRUE(base_ != nullptr && dms_ != nullptr);
  }

  TextScore Score(ActivationType activations) const {
    RunOptions options{.threads = 2,
                       .max_tokens = kChunk,
                       .activations = activations,
                       .budget_bytes = size_t{160} << 20,
                       .max_positions = 2048};
    Runner base(base_.get(), options);
    options.kv_mode = "dms-bf16";
    Runner dms(dms_.get(), options);
    return ScoreText(&base, &dms, tokens_, kChunk);
  }

  // Kept counts of the golden, [layer * head].
  std::vector<int> GoldenKept() const {
    std::vector<int> kept;
    for (const auto& layer : golden_["kept_per_layer_head"]) {
      for (const auto& count : layer) kept.push_back(count.get<int>());
    }
    return kept;
  }

  nlohmann::json golden_;
  std::vector<int32_t> tokens_;
  std::unique_ptr<Model> base_, dms_;
};

TEST_F(ProbeAdapter, Float32ActivationsGiveTheGoldenDecisions) {
  const TextScore score = Score(ActivationType::kFloat32);
  EXPECT_NEAR(score.mean_nll_base, golden_["nll_base"].get<double>(), 1e-3);
  EXPECT_NEAR(score.mean_nll, golden_["nll"].get<double>(), 1e-3);
  EXPECT_NEAR(score.mean_kld, golden_["kld"].get<double>(), 0.02 * golden_["kld"].get<double>());
  EXPECT_NEAR(score.same_top1, golden_["top1"].get<double>(), 0.003);
  EXPECT_NEAR(score.evict_rate, golden_["evict_rate"].get<double>(), 1e-4);
  const std::vector<int> golden = GoldenKept();
  ASSERT_EQ(score.kept.size(), golden.size());
  // The golden's K and V are float32 and ours are stored in BF16, so decisions nearest the
  // threshold fall otherwise: 46 of 184,320 on a host with AVX-512 BF16.
  int differing = 0;
  for (size_t i = 0; i < golden.size(); ++i) {
    EXPECT_NEAR(score.kept[i], golden[i], 4) << "layer " << i / 3 << " head " << i % 3;
    differing += std::abs(score.kept[i] - golden[i]);
  }
  EXPECT_LE(differing, 80);
  const auto first = golden_["nll_first_64"].get<std::vector<double>>();
  const auto last = golden_["nll_dms_last_64"].get<std::vector<double>>();
  for (size_t i = 0; i < first.size(); ++i) EXPECT_NEAR(score.nll_base[i], first[i], 0.06) << i;
  for (size_t i = 0; i < last.size(); ++i) {
    EXPECT_NEAR(score.nll[score.nll.size() - last.size() + i], last[i], 0.1) << i;
  }
}

TEST_F(ProbeAdapter, Bf16ActivationsStayWithinItsTolerance) {
  const TextScore score = Score(ActivationType::kBf16);
  EXPECT_NEAR(score.mean_nll_base, golden_["nll_base"].get<double>(), 0.01);
  EXPECT_NEAR(score.mean_nll, golden_["nll"].get<double>(), 0.01);
  EXPECT_NEAR(score.mean_kld, golden_["kld"].get<double>(), 0.15 * golden_["kld"].get<double>());
  EXPECT_NEAR(score.evict_rate, golden_["evict_rate"].get<double>(), 0.003);
  const std::vector<int> golden = GoldenKept();
  ASSERT_EQ(score.kept.size(), golden.size());
  for (size_t i = 0; i < golden.size(); ++i) {
    EXPECT_NEAR(score.kept[i], golden[i], std::max(4.0, 0.02 * golden[i]))
        << "layer " << i / 3 << " head " << i % 3;
  }
  // Of 2048 tokens about 1 in 7 stays beside the window of 256.
  EXPECT_LT(static_cast<double>(score.kv_bytes), 0.35 * static_cast<double>(score.kv_bytes_base));
}

}  // namespace
}  // namespace winnow::testing
