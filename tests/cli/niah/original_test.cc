#include "cli/niah/original.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/testing/test_data.h"
#include "tests/testing/tiny_served.h"

namespace winnow::cli {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

// The default template with the switch that Qwen3's has.
void LetItThink(const std::string& dir) {
  std::ofstream(dir + "/chat_template.jinja")
      << "{{ '<|im_start|>' }}{% if enable_thinking is false %}{% endif %}";
}

TEST(Prompt, FormsFollowTheTemplate) {
  const testing::TinyServed model;
  const PromptParts parts{.system = "Sys", .content = "Ask", .answer_start = "It is"};
  const PromptMaker chat = PromptMaker::Load(model.dir()).value();
  EXPECT_THAT(chat.forms(), ::testing::ElementsAre(PromptForm::kChat));
  EXPECT_EQ(chat.Text(PromptForm::kChat, parts).value(),
            "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\nAsk<|im_end|>\n"
            "<|im_start|>assistant\nIt is");
  EXPECT_EQ(chat.Text(PromptForm::kRaw, parts).value(), "Sys\n\nAsk\n\nIt is");
  EXPECT_EQ(chat.Text(PromptForm::kRaw, {.content = "Ask"}).value(), "Ask\nAnswer:");

  LetItThink(model.dir());
  const PromptMaker thinks = PromptMaker::Load(model.dir()).value();
  EXPECT_THAT(thinks.forms(), ::testing::ElementsAre(PromptForm::kThink, PromptForm::kNoThink));
  EXPECT_EQ(thinks.short_form(), PromptForm::kNoThink);
  const std::string think = thinks.Text(PromptForm::kThink, parts).value();
  EXPECT_EQ(think,
            "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\nAsk<|im_end|>\n"
            "<|im_start|>assistant\n");
  EXPECT_EQ(thinks.Text(PromptForm::kNoThink, parts).value(), think + "<think>\n\n</think>\n\n");

  std::ofstream(model.dir() + "/chat_template.jinja") << "{{ something.else }}";
  EXPECT_EQ(PromptMaker::Load(model.dir()).value().short_form(), PromptForm::kRaw);
}

TEST(Original, NeedleIsAParagraphAboutTheMiddle) {
  const testing::TinyServed model;
  const PromptMaker prompts = PromptMaker::Load(model.dir()).value();
  const std::vector<Sentence> filler = LoadFiller("").value();
  const std::string needle = "\n\nThe capital of Freedonia is Silverton.\n\n";
  for (const int tokens : {1500, 2048, 9000}) {
    const std::string text = OriginalContext(prompts.tokenizer(), filler, tokens).value();
    EXPECT_EQ(text.size(), static_cast<size_t>(tokens));  // a token is a byte here
    const double depth = static_cast<double>(text.find(needle)) / tokens;
    EXPECT_GE(depth, 0.5) << tokens;
    EXPECT_LE(depth, 0.75) << tokens;
  }
  EXPECT_EQ(OriginalContext(prompts.tokenizer(), filler, 40).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(Original, AnswerStandsBehindTheThoughts) {
  EXPECT_TRUE(OriginalCorrect("SILVERTON."));
  EXPECT_TRUE(OriginalCorrect("<think>Hm.</think> It is Silverton"));
  EXPECT_FALSE(OriginalCorrect("<think>Silverton?</think> It is Goldville"));
  EXPECT_FALSE(OriginalCorrect(""));
}

TEST(Original, MeasuresEachModeFormAndLength) {
  const testing::TinyServed model{{}, {.window = 32}};
  LetItThink(model.dir());
  const PromptMaker prompts = PromptMaker::Load(model.dir()).value();
  const OriginalOptions options{.engine = {.model_dir = model.dir(),
                                           .adapter_dir = model.adapter_dir(),
                                           .prefill_chunk = 256,
                                           .threads = 1},
                                .modes = {"dense-fp8", "dms-bf16"},
                                .lengths = {1200, 5000},
                                .iterations = 2,
                                .max_new_tokens = 5,
                                .progress = false};
  const Json rows = RunOriginal(options, prompts, LoadFiller("").value()).value()["rows"];
  ASSERT_EQ(rows.size(), 3u * 2 * 2);
  EXPECT_EQ(rows[0]["mode"], "dense-bf16");
  EXPECT_EQ(rows[0]["form"], "think");
  EXPECT_EQ(rows[11]["form"], "no_think");
  for (const Json& row : rows) {
    EXPECT_EQ(row["answers"].size(), 2u);
    EXPECT_GT(row["ttft_s"], 0.0);
    EXPECT_GE(row["elapsed_s"], row["ttft_s"]);
    EXPECT_GT(row["tokens_per_s"], 0.0);
    EXPECT_GT(row["rss_bytes"], 1 << 20);
    // The second length does not fit the model's 2048 tokens.
    EXPECT_LE(row["prompt_tokens"].get<int>() + 5, 2048);
    EXPECT_GT(row["prompt_tokens"], row["length"] == 5000 ? 2000 : 1200);
    EXPECT_EQ(row["live_ratio"].get<double>() > 1.5, row["mode"] == "dms-bf16");
    EXPECT_EQ(row["kv_bytes"] == row["kv_bytes_dense_bf16"], row["mode"] == "dense-bf16");
    EXPECT_FALSE(row["correct"]);
  }
  // The same seeds give the same answers.
  const Json again = RunOriginal(options, prompts, LoadFiller("").value()).value()["rows"];
  for (size_t i = 0; i < rows.size(); ++i) EXPECT_EQ(again[i]["answers"], rows[i]["answers"]);
  const std::string table = OriginalTable(rows);
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 13);
  EXPECT_THAT(table, HasSubstr("no (0/2)"));
}

TEST(Original, MistakesAreNamed) {
  const testing::TinyServed model;
  const PromptMaker prompts = PromptMaker::Load(model.dir()).value();
  OriginalOptions options{.engine = {.model_dir = model.dir(), .adapter_dir = "", .threads = 1},
                          .modes = {},
                          .lengths = {30},
                          .progress = false};
  const auto error = [&] {
    const absl::Status status = RunOriginal(options, prompts, LoadFiller("").value()).status();
    EXPECT_FALSE(status.ok());
    return std::string(status.message());
  };
  EXPECT_THAT(error(), HasSubstr("--lengths: 30"));
  options.max_new_tokens = 2040;  // leaves the text no room
  EXPECT_THAT(error(), HasSubstr("--lengths: 30"));
  options.modes = {"dense-fp9"};
  EXPECT_THAT(error(), HasSubstr("dense-fp9"));
  options.modes = {};
  options.lengths = {};
  EXPECT_THAT(error(), HasSubstr("--lengths is empty"));
}

}  // namespace
}  // namespace winnow::cli
