#include "cli/niah/score.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace winnow::cli {
namespace {

using ::testing::HasSubstr;

// 95 % Wilson intervals by the closed formula, computed in Python.
TEST(Wilson, HasTheKnownValues) {
  const struct {
    int64_t successes, trials;
    double low, high;
  } cases[] = {{0, 10, 0.0000000, 0.2775328},    {1, 10, 0.0178762, 0.4041500},
               {5, 10, 0.2365931, 0.7634069},    {10, 10, 0.7224672, 1.0000000},
               {38, 40, 0.8349612, 0.9861793},   {190, 200, 0.9104219, 0.9726174},
               {199, 200, 0.9722263, 0.9991168}, {1, 1, 0.2065493, 1.0000000}};
  for (const auto& c : cases) {
    const Interval interval = WilsonInterval(c.successes, c.trials);
    EXPECT_NEAR(interval.low, c.low, 5e-7) << c.successes << "/" << c.trials;
    EXPECT_NEAR(interval.high, c.high, 5e-7) << c.successes << "/" << c.trials;
  }
  EXPECT_EQ(WilsonInterval(0, 0).low, 0);
  EXPECT_EQ(WilsonInterval(0, 0).high, 1);
  EXPECT_EQ(WilsonInterval(0, 7).low, 0);
  EXPECT_EQ(WilsonInterval(7, 7).high, 1);
}

NiahResult Result(bool found, uint64_t live) {
  return {.found = found,
          .text = found ? "yes" : "no",
          .prompt_tokens = 90,
          .new_tokens = 5,
          .ttft_s = 0.5,
          .total_s = 0.7,
          .live_tokens = live,
          .logical_tokens = 100,
          .kv_bytes = 10 * live,
          .kv_bytes_dense_bf16 = 4000};
}

TEST(Summarize, CountsByLengthDepthAndKindBesideTheBase) {
  const std::vector<NiahTask> tasks = {{.id = "a", .kind = "single", .context = 512, .depth = 0},
                                       {.id = "b", .kind = "facts", .context = 512, .depth = 0.5},
                                       {.id = "c", .kind = "single", .context = 2048, .depth = 0},
                                       {.id = "d", .kind = "single", .context = 2048, .depth = 1}};
  const NiahModeResults base{
      "dense-bf16", {Result(true, 100), Result(true, 100), Result(true, 100), Result(false, 100)}};
  const NiahModeResults mode{
      "dms-fp8", {Result(true, 50), Result(false, 25), Result(true, 20), Result(true, 5)}};
  const nlohmann::ordered_json modes = Summarize(tasks, {base, mode});
  const auto& all = modes["dms-fp8"]["all"];
  EXPECT_EQ(all["tasks"], 4);
  EXPECT_EQ(all["base_found"], 3);
  EXPECT_EQ(all["found"], 3);
  EXPECT_EQ(all["found_of_base"], 2);
  EXPECT_EQ(all["rate"], 0.75);
  EXPECT_EQ(all["of_base"], 2.0 / 3);
  EXPECT_EQ(all["of_base_low"], WilsonInterval(2, 3).low);
  EXPECT_EQ(all["rate_high"], WilsonInterval(3, 4).high);
  EXPECT_EQ(all["live_ratio"], 4.0);
  EXPECT_EQ(all["kv_bytes"], 250.0);
  EXPECT_EQ(all["ttft_s"], 0.5);
  EXPECT_EQ(all["prefill_tokens_per_s"], 180.0);
  EXPECT_NEAR(all["decode_tokens_per_s"].get<double>(), 20.0, 1e-9);
  const auto& length = modes["dms-fp8"]["by_length"];
  EXPECT_EQ(length["512"]["found_of_base"], 1);
  EXPECT_EQ(length["512"]["base_found"], 2);
  EXPECT_EQ(length["2048"]["found_of_base"], 1);
  // In the order of numbers, not of text.
  EXPECT_EQ(length.begin().key(), "512");
  EXPECT_EQ(modes["dms-fp8"]["by_depth"]["0%"]["found"], 2);
  EXPECT_EQ(modes["dms-fp8"]["by_depth"]["100%"]["of_base"], nullptr);
  EXPECT_EQ(modes["dms-fp8"]["by_kind"]["facts"]["found"], 0);
  EXPECT_EQ(modes["dense-bf16"]["all"]["of_base"], 1.0);
  const std::string table = NiahTable(modes);
  EXPECT_THAT(table, HasSubstr("dms-fp8     all     3/4  75.0% [30.1, 95.4]"));
  EXPECT_THAT(table, HasSubstr("2/3  66.7% [20.8, 93.9]"));
  EXPECT_THAT(table, HasSubstr("dms-fp8     100%    1/1 100.0%"));
}

}  // namespace
}  // namespace winnow::cli
