#include "common/dms/dms_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace winnow {
namespace {

using kernels::ChannelZeroing;
using kernels::DecisionSource;

DmsConfig Parsed(std::string_view json, bool has_q_norm) {
  auto config = ParseDmsConfig(json, has_q_norm);
  EXPECT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config.ok() && config->has_value());
  return config.ok() && config->has_value() ? **config : DmsConfig();
}

TEST(DmsConfig, NvidiaQwen3ConfigJson) {
  const DmsConfig c = Parsed(R"({"model_type": "qwen3", "dms_alpha_scale": 100,
      "dms_initial_alpha_offset": 5, "dms_window_size": 512, "dms_cr": 8})",
                             /*has_q_norm=*/true);
  EXPECT_EQ(c.window, 512);
  EXPECT_EQ(c.shift, 1);
  EXPECT_EQ(c.rule.source, DecisionSource::kBorrowedAfterQNorm);
  EXPECT_EQ(c.rule.zeroing, ChannelZeroing::kBeforeAndAfterRope);
  EXPECT_EQ(c.rule.scale, 100.0f);
  EXPECT_EQ(c.rule.offset, 5.0f);
}

TEST(DmsConfig, FastDmsLlamaUnderConfig) {
  const DmsConfig c =
      Parsed(R"({"config": {"window_size": 128, "alpha_offset": 4.25, "alpha_scale": 50}})",
             /*has_q_norm=*/false);
  EXPECT_EQ(c.window, 128);
  EXPECT_EQ(c.shift, 0);
  EXPECT_EQ(c.rule.source, DecisionSource::kBorrowedBeforeQNorm);
  EXPECT_EQ(c.rule.zeroing, ChannelZeroing::kBeforeRope);
  EXPECT_EQ(c.rule.scale, 50.0f);
  EXPECT_EQ(c.rule.offset, 4.25f);
}

TEST(DmsConfig, DefaultsDependOnTheArchitecture) {
  EXPECT_EQ(Parsed(R"({"dms_cr": 8})", true).window, 512);
  EXPECT_EQ(Parsed(R"({"dms_cr": 8})", false).window, 256);
}

TEST(DmsConfig, AdapterWithItsOwnProjection) {
  const DmsConfig c = Parsed(R"({"dms_window_size": 256, "dms_separate_alpha": true,
      "dms_alpha_per": "layer", "dms_decision_shift": 0})",
                             false);
  EXPECT_EQ(c.rule.source, DecisionSource::kLogits);
  EXPECT_EQ(c.rule.zeroing, ChannelZeroing::kNone);
  EXPECT_TRUE(c.rule.per_layer);
  EXPECT_EQ(c.shift, 0);
}

TEST(DmsConfig, NoKeysIsNoDms) {
  auto config = ParseDmsConfig(R"({"model_type": "llama", "sliding_window": 4096})", false);
  ASSERT_TRUE(config.ok());
  EXPECT_FALSE(config->has_value());
}

TEST(DmsConfig, BadValuesAreNamed) {
  for (const auto& [json, field] :
       {std::pair{R"({"dms_window_size": 0})", "dms_window_size"},
        std::pair{R"({"dms_window_size": 99999999999999999999})", "dms_window_size"},
        std::pair{R"({"dms_window_size": 1.5})", "dms_window_size"},
        std::pair{R"({"dms_window_size": "512"})", "dms_window_size"},
        std::pair{R"({"dms_cr": 8, "dms_decision_shift": 2})", "dms_decision_shift"},
        std::pair{R"({"dms_cr": 8, "dms_alpha_scale": 1e300})", "dms_alpha_scale"},
        std::pair{R"({"dms_cr": 8, "dms_alpha_per": "token"})", "dms_alpha_per"},
        std::pair{R"({"dms_cr": 8, "dms_separate_alpha": 1})", "dms_separate_alpha"},
        std::pair{R"({"dms_cr": 8, "dms_logit_source": "q_norm"})", "dms_logit_source"},
        std::pair{R"([1, 2])", "JSON"}, std::pair{"{", "JSON"}}) {
    const auto config = ParseDmsConfig(json, /*has_q_norm=*/false);
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << json;
    EXPECT_NE(config.status().message().find(field), absl::string_view::npos) << config.status();
  }
}

TEST(DmsConfig, LooksInTheAdapterThenTheModel) {
  const std::string dir = testing::TempDir() + "/dms_config_test";
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir + "/model");
  std::filesystem::create_directories(dir + "/adapter");
  std::ofstream(dir + "/model/config.json") << R"({"dms_window_size": 64})";
  EXPECT_EQ((*LoadDmsConfig(dir + "/model", "", false))->window, 64);
  EXPECT_EQ(LoadDmsConfig(dir + "/model", dir + "/adapter", false).status().code(),
            absl::StatusCode::kNotFound);
  std::ofstream(dir + "/model/dms_metadata.json") << R"({"dms_window_size": 32})";
  EXPECT_EQ((*LoadDmsConfig(dir + "/model", "", false))->window, 32);
  std::ofstream(dir + "/adapter/dms_metadata.json") << R"({"dms_window_size": 16})";
  EXPECT_EQ((*LoadDmsConfig(dir + "/model", dir + "/adapter", false))->window, 16);
  EXPECT_FALSE(LoadDmsConfig(dir, "", false)->has_value());
}

TEST(DmsConfig, ProbeAdapter) {
  const std::string dir = "../shared/data/smollm2_dms_probe";
  if (!std::filesystem::exists(dir)) {
    ASSERT_EQ(std::getenv("WINNOW_REQUIRE_DATA"), nullptr) << dir << " is missing";
    GTEST_SKIP() << dir << " is missing";
  }
  const auto config = LoadDmsConfig("", dir, false);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ((*config)->window, 256);
  EXPECT_EQ((*config)->shift, 1);
  EXPECT_EQ((*config)->rule.source, DecisionSource::kLogits);
  EXPECT_FALSE((*config)->rule.per_layer);
}

TEST(DescribeRuleTest, TellsRulesApart) {
  kernels::DecisionRule rule;
  EXPECT_EQ(DescribeRule(rule), "");
  rule.source = kernels::DecisionSource::kLogits;
  EXPECT_EQ(DescribeRule(rule), "logits*100-5");
  rule.offset = 6.5f;
  rule.per_layer = true;
  EXPECT_EQ(DescribeRule(rule), "logits*100-6.5/layer");
  rule.source = kernels::DecisionSource::kBorrowedAfterQNorm;
  rule.offset = std::nextafter(6.5f, 7.0f);
  EXPECT_EQ(DescribeRule(rule), "q_norm*100-6.50000048/layer");
  rule.zeroing = kernels::ChannelZeroing::kBeforeAndAfterRope;
  EXPECT_EQ(DescribeRule(rule), "q_norm*100-6.50000048/layer/zero_both");
  rule.source = kernels::DecisionSource::kNone;
  EXPECT_EQ(DescribeRule(rule), "/zero_both");
  rule.zeroing = kernels::ChannelZeroing::kBeforeRope;
  EXPECT_EQ(DescribeRule(rule), "/zero_before_rope");
}

}  // namespace
}  // namespace winnow
