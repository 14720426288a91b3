#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "cli/eval/evaluate.h"
#include "cli/eval/modes.h"
#include "cli/eval/resume.h"
#include "cli/eval/score.h"
#include "cli/eval/short_protocol.h"
#include "cli/eval/windows.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_served.h"

namespace winnow::cli {
namespace {

using ::testing::HasSubstr;
using testing::TempDir;
using testing::TinyServed;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

TEST(ParseEvalModesTest, NamesModesAndThresholds) {
  const auto one = ParseEvalModes({"dense-fp8", "dms-bf16"}, {2.5f});
  ASSERT_TRUE(one.ok()) << one.status();
  ASSERT_EQ(one->size(), 2u);
  EXPECT_EQ((*one)[0].name, "dense-fp8");
  EXPECT_EQ((*one)[0].threshold, 0);
  EXPECT_EQ((*one)[1].name, "dms-bf16");
  EXPECT_EQ((*one)[1].threshold, 2.5f);

  const auto curve = ParseEvalModes({"dms-fp8", "dms-bf16@4"}, {-2, 0.5f});
  ASSERT_TRUE(curve.ok()) << curve.status();
  ASSERT_EQ(curve->size(), 3u);
  EXPECT_EQ((*curve)[0].name, "dms-fp8@-2");
  EXPECT_EQ((*curve)[1].name, "dms-fp8@0.5");
  EXPECT_EQ((*curve)[2].name, "dms-bf16@4");
  EXPECT_EQ((*curve)[2].kv_mode, "dms-bf16");
  EXPECT_EQ((*curve)[2].threshold, 4);
}

TEST(ParseEvalModesTest, RefusesByName) {
  const auto message = [](const std::vector<std::string>& names) {
    return std::string(ParseEvalModes(names, {}).status().message());
  };
  EXPECT_THAT(message({}), HasSubstr("no mode"));
  EXPECT_THAT(message({"dms-fp7"}), HasSubstr("fp7"));
  EXPECT_THAT(message({"dms-fp8@x"}), HasSubstr("\"x\" is no threshold"));
  EXPECT_THAT(message({"dms-fp8@nan"}), HasSubstr("nan is outside"));
  EXPECT_THAT(ParseEvalModes({"dms-fp8"}, {INFINITY}).status().message(),
              HasSubstr("inf is outside [-1e6, 1e6]"));
  EXPECT_THAT(message({"dense-fp8@1"}), HasSubstr("a dense mode has no threshold"));
  EXPECT_THAT(message({"dms-fp8", "dms-fp8"}), HasSubstr("given twice"));
}

TEST(PlanWindowsTest, StrideScoresEveryTokenOnce) {
  for (const int stride : {1, 3, 7, 10}) {
    const auto windows = PlanWindows(100, 10, 5, Scoring::kStride, stride);
    ASSERT_TRUE(windows.ok()) << windows.status();
    std::vector<int> scored(100);
    for (const EvalWindow& window : *windows) {
      for (int i = window.first_target; i < window.length; ++i) {
        ++scored[static_cast<size_t>(window.begin + i)];
      }
    }
    const int end = 10 + 4 * stride;
    for (int i = 0; i < end; ++i) {
      // Windows that do not overlap cannot predict their first token.
      const bool first = stride == 10 ? i % 10 == 0 : i == 0;
      EXPECT_EQ(scored[static_cast<size_t>(i)], first ? 0 : 1) << "stride " << stride << " " << i;
    }
  }
}

TEST(PlanWindowsTest, AllAndHalf) {
  const auto all = PlanWindows(16, 8, 2, Scoring::kAll, 0);
  ASSERT_TRUE(all.ok());
  EXPECT_EQ((*all)[1].begin, 8);
  EXPECT_EQ((*all)[1].first_target, 1);
  const auto half = PlanWindows(16, 8, 2, Scoring::kHalf, 0);
  ASSERT_TRUE(half.ok());
  EXPECT_EQ((*half)[0].first_target, 5);  // llama.cpp scores 8 - 1 - 8 / 2 = 3 targets
}

TEST(PlanWindowsTest, RefusesByName) {
  EXPECT_THAT(PlanWindows(15, 8, 2, Scoring::kAll, 0).status().message(),
              HasSubstr("has 15 tokens; 2 windows of 8 need 16"));
  EXPECT_THAT(PlanWindows(15, 1, 2, Scoring::kAll, 0).status().message(), HasSubstr("context=1"));
  EXPECT_THAT(PlanWindows(15, 8, 0, Scoring::kAll, 0).status().message(), HasSubstr("windows=0"));
  EXPECT_THAT(PlanWindows(15, 2, 1, Scoring::kHalf, 0).status().message(),
              HasSubstr("context=2 leaves nothing"));
  EXPECT_THAT(PlanWindows(15, 8, 1, Scoring::kStride, 9).status().message(), HasSubstr("stride=9"));
}

TEST(ScoreRowTest, IsTheDefinition) {
  const std::vector<float> base = {1.0f, -2.0f, 0.5f, 3.0f}, mode = {0.9f, -2.5f, 0.7f, 2.0f};
  double base_sum = 0, mode_sum = 0;
  for (size_t i = 0; i < base.size(); ++i) {
    base_sum += std::exp(double{base[i]});
    mode_sum += std::exp(double{mode[i]});
  }
  double kld = 0;
  for (size_t i = 0; i < base.size(); ++i) {
    const double p = std::exp(double{base[i]}) / base_sum;
    kld += p * std::log(p / (std::exp(double{mode[i]}) / mode_sum));
  }
  const RowScore row = ScoreRow(base, Summarize(base), mode, 2);
  // Each exp is rounded to float32: relative 2^-24 of terms below 1.
  EXPECT_NEAR(row.kld, kld, 1e-6);
  EXPECT_NEAR(row.nll_base, std::log(base_sum) - 0.5, 1e-6);
  EXPECT_NEAR(row.nll, std::log(mode_sum) - double{0.7f}, 1e-6);
  EXPECT_TRUE(row.same_top);
  EXPECT_EQ(ScoreRow(base, Summarize(base), base, 0).kld, 0);
}

// A model of bytes, windows of text for it.
class EvaluateTest : public ::testing::Test {
 protected:
  EvaluateTest() {
    std::string text;
    uint32_t state = 7;
    while (text.size() < 5000) {
      state = state * 1664525 + 1013904223;
      text += static_cast<char>('a' + (state >> 24) % 26);
    }
    temp_.Write("text", text);
  }

  EvaluateOptions Options() const {
    return {.model_dir = model_.dir(),
            .adapter_dir = model_.adapter_dir(),
            .text_file = temp_.File("text"),
            .modes = {"dms-bf16", "dms-fp8", "dense-bf16"},
            .contexts = {700},
            .windows = 2,
            .threads = 2,
            .progress = false};
  }
  static nlohmann::ordered_json Run(const EvaluateOptions& options) {
    absl::StatusOr<nlohmann::ordered_json> result = Evaluate(options);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() ? *result : nlohmann::ordered_json();
  }

  TempDir temp_;
  TinyServed model_{{.tie_embeddings = false}};
};

TEST_F(EvaluateTest, TheBaseDiffersInNothingFromItself) {
  const nlohmann::ordered_json row = Run(Options())["modes"]["dense-bf16"];
  EXPECT_EQ(row["kld"], 0.0);
  EXPECT_EQ(row["ppl"], row["ppl_base"]);
  EXPECT_EQ(row["top1"], 1.0);
  EXPECT_EQ(row["live_ratio"], 1.0);
  EXPECT_EQ(row["evict_rate"], 0.0);
  EXPECT_EQ(row["kv_bytes"], row["kv_bytes_dense_bf16"]);
  EXPECT_EQ(row["positions"], 2 * 699);
}

TEST_F(EvaluateTest, CountsAndBuckets) {
  const nlohmann::ordered_json result = Run(Options());
  const nlohmann::ordered_json& row = result["modes"]["dms-bf16"];
  EXPECT_GT(row["kld"], 0.0);
  EXPECT_GT(row["evict_rate"], 0.2);
  EXPECT_GT(row["live_ratio"], 1.2);
  EXPECT_LT(row["kv_bytes"], row["kv_bytes_dense_bf16"]);
  ASSERT_EQ(row["by_position"].size(), 2u);
  EXPECT_EQ(row["by_position"][0]["positions"], 2 * 511);
  EXPECT_EQ(row["by_position"][1]["positions"], 2 * 188);
  const double mean = (row["by_position"][0]["kld"].get<double>() * 511 +
                       row["by_position"][1]["kld"].get<double>() * 188) /
                      699;
  EXPECT_NEAR(row["kld"].get<double>(), mean, 1e-12);
  ASSERT_EQ(row["memory"].size(), 2u);
  EXPECT_EQ(row["memory"][0]["tokens"], 512);
  EXPECT_EQ(row["memory"][1]["tokens"], 700);
  EXPECT_EQ(row["memory"][1]["kv_bytes"], row["kv_bytes"]);
  double live = 0;
  for (const auto& layer : row["live_per_layer_head"]) {
    for (const auto& head : layer) live += head.get<double>();
  }
  EXPECT_NEAR(row["live_ratio"].get<double>(), 700.0 * 4 / live, 1e-9);
  EXPECT_GT(result["noise"]["kld"], 0.0);
}

TEST_F(EvaluateTest, ChunksAndTheDecodeTailChangeNoFigure) {
  const nlohmann::ordered_json modes = Run(Options())["modes"];
  for (const int chunk : {7, 64, 1024}) {
    EvaluateOptions options = Options();
    options.prefill_chunk = chunk;
    EXPECT_EQ(Run(options)["modes"], modes) << "chunk " << chunk;
  }
  for (const int tail : {1, 100, 700}) {
    EvaluateOptions options = Options();
    options.decode_tail = tail;
    EXPECT_EQ(Run(options)["modes"], modes) << "tail " << tail;
  }
}

TEST_F(EvaluateTest, TheThresholdShiftsTheOffset) {
  EvaluateOptions options = Options();
  options.modes = {"dms-bf16"};
  options.thresholds = {-1e6f, -20, 20, 1e6f};
  const nlohmann::ordered_json modes = Run(options)["modes"];
  EXPECT_GT(modes["dms-bf16@-1e+06"]["evict_rate"], 0.99);
  EXPECT_GT(modes["dms-bf16@-20"]["evict_rate"], modes["dms-bf16@20"]["evict_rate"]);
  EXPECT_EQ(modes["dms-bf16@20"]["dms_threshold"], 20);
  EXPECT_EQ(modes["dms-bf16@1e+06"]["evict_rate"], 0.0);
  EXPECT_EQ(modes["dms-bf16@1e+06"]["live_ratio"], 1.0);
  EXPECT_EQ(modes["dms-bf16@1e+06"]["kld"], 0.0);  // the adapter has no weight update
}

TEST_F(EvaluateTest, SeveralContextsAreSeveralRuns) {
  EvaluateOptions options = Options();
  const nlohmann::ordered_json longer = Run(options)["modes"];
  options.contexts = {300};
  const nlohmann::ordered_json shorter = Run(options)["modes"];
  options.contexts = {300, 700};
  const nlohmann::ordered_json both = Run(options)["contexts"];
  ASSERT_EQ(both.size(), 2u);
  EXPECT_EQ(both[0]["context"], 300);
  EXPECT_EQ(both[0]["modes"], shorter);
  EXPECT_EQ(both[1]["modes"], longer);
}

TEST_F(EvaluateTest, HalfScoresTheSecondHalf) {
  EvaluateOptions options = Options();
  options.scoring = Scoring::kHalf;
  const nlohmann::ordered_json row = Run(options)["modes"]["dms-fp8"];
  EXPECT_EQ(row["positions"], 2 * (700 - 1 - 350));
}

TEST_F(EvaluateTest, GoesOnWhereItWasInterrupted) {
  EvaluateOptions options = Options();
  const nlohmann::ordered_json modes = Run(options)["modes"];
  options.resume_file = temp_.File("partial");
  options.dump_file = temp_.File("no/such/dir");  // fails when all windows are done
  EXPECT_EQ(Evaluate(options).status().code(), absl::StatusCode::kUnavailable);
  const std::string saved = ReadFile(options.resume_file);
  ASSERT_FALSE(saved.empty());

  options.dump_file.clear();
  EXPECT_EQ(Run(options)["modes"], modes);

  // From the first window of two on: what a kill in the second leaves.
  EvaluateOptions first = options;
  first.windows = 1;
  first.resume_file = temp_.File("first");
  Run(first);
  nlohmann::json after_one = nlohmann::json::parse(saved);
  after_one["contexts"] = nlohmann::json::parse(ReadFile(first.resume_file))["contexts"];
  ASSERT_EQ(after_one["contexts"]["700"][0]["windows"], 1);
  temp_.Write("partial", after_one.dump());
  EXPECT_EQ(Run(options)["modes"], modes);

  // What was saved is used: a sum that is changed shows.
  nlohmann::json changed = nlohmann::json::parse(saved);
  changed["contexts"]["700"][0]["total"]["kld"] = 2.0 * 699 * 5.0;
  temp_.Write("partial", changed.dump());
  EXPECT_EQ(Run(options)["modes"]["dms-bf16"]["kld"], 5.0);

  temp_.Write("partial", saved);
  options.windows = 1;
  EXPECT_EQ(Evaluate(options).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReadFile(options.resume_file), saved) << "another evaluation's sums were touched";
  temp_.Write("partial", saved.substr(0, saved.size() / 2));
  EXPECT_THAT(Evaluate(options).status().message(), HasSubstr("partial"));
}

TEST_F(EvaluateTest, TheDumpHoldsTheDecisions) {
  EvaluateOptions options = Options();
  options.dump_file = temp_.File("dump");
  options.windows = 1;
  const nlohmann::ordered_json row = Run(options)["modes"]["dms-bf16"];
  const std::string dump = ReadFile(options.dump_file);
  uint64_t size = 0;
  ASSERT_GT(dump.size(), 8u);
  std::memcpy(&size, dump.data(), 8);
  const nlohmann::json header = nlohmann::json::parse(dump.substr(8, size));
  EXPECT_EQ(header["__metadata__"]["mode"], "dms-bf16");
  EXPECT_EQ(header["__metadata__"]["dms_decision_shift"], "1");
  EXPECT_EQ(header["logits"]["shape"], nlohmann::json({64, 259}));
  ASSERT_EQ(header["decisions"]["shape"], nlohmann::json({2, 700, 2}));
  const size_t begin = 8 + size + header["decisions"]["data_offsets"][0].get<size_t>();
  ASSERT_EQ(dump.size() - begin, 2u * 700 * 2);
  for (size_t layer = 0; layer < 2; ++layer) {
    for (size_t head = 0; head < 2; ++head) {
      int kept = 700;  // the bit of token t is token t - 1's
      for (size_t t = 1; t < 700; ++t) kept -= dump[begin + (layer * 700 + t) * 2 + head];
      EXPECT_EQ(row["kept_per_layer_head"][layer][head], kept);
    }
  }
}

TEST_F(EvaluateTest, TheShortProtocolScoresAll) {
  EvaluateOptions options = Options();
  options.modes = {"dense-bf16", "dms-fp8"};
  const absl::StatusOr<nlohmann::ordered_json> result = EvaluateShort(options);
  ASSERT_TRUE(result.ok()) << result.status();
  const nlohmann::ordered_json& base = (*result)["modes"]["dense-bf16"];
  EXPECT_EQ(base["teacher_forced"]["token_match"], 1.0);
  EXPECT_EQ(base["teacher_forced"]["kld"], 0.0);
  EXPECT_EQ(base["free_running"]["token_match"], 1.0);
  EXPECT_EQ(base["free_running"]["scored"], 64);
  EXPECT_EQ(base["free_running"]["first_difference"],
            nlohmann::json({nullptr, nullptr, nullptr, nullptr}));
  const nlohmann::ordered_json& dms = (*result)["modes"]["dms-fp8"];
  EXPECT_EQ(dms["teacher_forced"]["scored"], 64);
  EXPECT_GT(dms["teacher_forced"]["kld"], 0.0);
  EXPECT_GT(dms["live_ratio"], 1.2);
}

TEST_F(EvaluateTest, RefusesByName) {
  EvaluateOptions options = Options();
  options.contexts = {4000};
  options.windows = 1;
  EXPECT_THAT(Evaluate(options).status().message(), HasSubstr("max_model_len=4000"));
  options.contexts = {};
  EXPECT_THAT(Evaluate(options).status().message(), HasSubstr("no context"));
  options = Options();
  options.windows = 100;
  EXPECT_THAT(Evaluate(options).status().message(), HasSubstr("5000 tokens"));
  options = Options();
  options.text_file = temp_.File("none");
  EXPECT_EQ(Evaluate(options).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace winnow::cli
