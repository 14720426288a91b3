#include "cli/niah/grid.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "cli/niah/log.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_served.h"

namespace winnow::cli {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

class Grid : public ::testing::Test {
 protected:
  Grid() {
    const PromptMaker prompts = PromptMaker::Load(model_.dir()).value();
    NiahTaskOptions options{.lengths = {700, 1000}, .tasks = 3, .max_new_tokens = 6};
    options.depths = {0, 0.5, 1};
    tasks_ = MakeTasks(options, prompts, LoadFiller("").value()).value();
    options_ = {.engine = {.model_dir = model_.dir(),
                           .adapter_dir = model_.adapter_dir(),
                           .prefill_chunk = 128,
                           .threads = 1},
                .modes = {"dms-fp8"},
                .resume = {},
                .progress = false};
  }

  Json Run(const GridOptions& options) const {
    const absl::StatusOr<Json> result = RunGrid(options, tasks_);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() ? *result : Json();
  }
  // What a run found, without its times.
  static Json Answers(const Json& result) {
    Json answers = Json::array();
    for (const Json& task : result["tasks"]) {
      for (const Json& mode : task["results"]) {
        answers.push_back({mode["text"], mode["live_tokens"], mode["kv_bytes"]});
      }
    }
    return answers;
  }
  std::vector<std::string> Lines(const std::string& file) const {
    return absl::StrSplit(testing::ReadWholeFile(dir_.File(file)), '\n', absl::SkipEmpty());
  }

  const testing::TinyServed model_{{}, {.window = 32, .lora_rank = 2}};
  const testing::TempDir dir_;
  std::vector<NiahTask> tasks_;
  GridOptions options_;
};

TEST_F(Grid, RunsEachTaskInTheBaseAndEachMode) {
  const Json result = Run(options_);
  ASSERT_EQ(result["tasks"].size(), 6u);
  for (size_t i = 0; i < tasks_.size(); ++i) {
    const Json& row = result["tasks"][i];
    EXPECT_EQ(row["id"], tasks_[i].id);
    EXPECT_EQ(row["results"].size(), 2u);
    for (const char* mode : {"dense-bf16", "dms-fp8"}) {
      const Json& r = row["results"][mode];
      EXPECT_EQ(r["prompt_tokens"], tasks_[i].prompt_ids.size());
      EXPECT_GE(r["new_tokens"], 1);
      EXPECT_LE(r["new_tokens"], 6);
      EXPECT_GT(r["ttft_s"], 0.0);
      EXPECT_GE(r["total_s"], r["ttft_s"]);
    }
    const Json& dense = row["results"]["dense-bf16"];
    EXPECT_EQ(dense["live_tokens"], dense["logical_tokens"]);
    EXPECT_EQ(dense["kv_bytes"], dense["kv_bytes_dense_bf16"]);
    const Json& dms = row["results"]["dms-fp8"];
    EXPECT_LT(dms["live_tokens"], dms["logical_tokens"]);
    EXPECT_LT(dms["kv_bytes"], dms["kv_bytes_dense_bf16"]);
  }
  EXPECT_EQ(result["modes"].size(), 2u);
  EXPECT_EQ(result["modes"].begin().key(), "dense-bf16");
  EXPECT_EQ(result["modes"]["dms-fp8"]["all"]["tasks"], 6);
}

// The tiny model says nothing sensible, so a task whose answer is what it says.
TEST_F(Grid, FindsWhatTheModelSays) {
  const std::string said = Run(options_)["tasks"][1]["results"]["dense-bf16"]["text"];
  ASSERT_FALSE(said.empty());
  tasks_[1].answers = {said.substr(0, 1)};
  const Json result = Run(options_);
  EXPECT_TRUE(result["tasks"][1]["results"]["dense-bf16"]["found"]);
  EXPECT_EQ(result["modes"]["dense-bf16"]["all"]["found"], 1);
}

TEST_F(Grid, AThresholdOfAModeMovesWhatItEvicts) {
  options_.modes = {"dms-bf16@-1000", "dms-bf16", "dms-bf16@1000"};
  const Json modes = Run(options_)["modes"];
  const auto live = [&](const char* mode) {
    return modes[mode]["all"]["live_ratio"].get<double>();
  };
  EXPECT_GT(live("dms-bf16@-1000"), live("dms-bf16"));
  EXPECT_GT(live("dms-bf16"), 1.0);
  EXPECT_EQ(live("dms-bf16@1000"), 1.0);
}

TEST_F(Grid, ChunksAndThreadsChangeNoAnswer) {
  GridOptions other = options_;
  other.engine.prefill_chunk = 333;
  other.engine.threads = 3;
  EXPECT_EQ(Answers(Run(options_)), Answers(Run(other)));
}

TEST_F(Grid, GoesOnBehindAKilledRun) {
  options_.resume = dir_.File("log");
  const Json whole = Run(options_);
  const std::vector<std::string> lines = Lines("log");
  ASSERT_EQ(lines.size(), 12u);
  // A run that was killed within its fifth line, and whose third was a special one.
  Json third = Json::parse(lines[2]);
  third["text"] = "from the log";
  third["found"] = true;
  dir_.Write("log", absl::StrCat(lines[0], "\n", lines[1], "\n", third.dump(), "\n", lines[3], "\n",
                                 lines[4].substr(0, lines[4].size() / 2)));
  const Json resumed = Run(options_);
  EXPECT_EQ(resumed["tasks"][2]["results"]["dense-bf16"]["text"], "from the log");
  EXPECT_EQ(resumed["modes"]["dense-bf16"]["all"]["found"], 1);
  Json expected = Answers(whole), answers = Answers(resumed);
  for (Json* json : {&expected, &answers}) (*json)[4][0] = nullptr;
  EXPECT_EQ(answers, expected);
  EXPECT_EQ(Lines("log").size(), 12u);
  // And again: nothing is left to run, so the times are the log's too.
  EXPECT_EQ(Run(options_), resumed);
  EXPECT_EQ(Lines("log").size(), 12u);
}

TEST_F(Grid, ALogOfOtherTasksOrWeightsIsRefused) {
  options_.resume = dir_.File("log");
  Run(options_);
  const testing::TinyServed other{{.seed = 9}, {.window = 32}};
  GridOptions weights = options_;
  weights.engine.model_dir = other.dir();
  absl::Status status = RunGrid(weights, tasks_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("mode dense-bf16 had other weights"));
  tasks_[2].answers = {"else"};
  status = RunGrid(options_, tasks_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("task " + tasks_[2].id + " was another"));
}

TEST_F(Grid, ABadLogIsNamed) {
  for (const char* text : {"nonsense\n", "{}\n", "[1]\n"}) {
    dir_.Write("bad", text);
    const absl::Status status = NiahLog::Open(dir_.File("bad")).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("bad:1: is no result"));
  }
  EXPECT_EQ(NiahLog::Open("/nowhere/log").status().code(), absl::StatusCode::kUnavailable);
}

// A line without an end is cut off only where a killed run may have left it.
TEST_F(Grid, AForeignFileIsLeftAlone) {
  dir_.Write("notes", "not a log");
  EXPECT_EQ(NiahLog::Open(dir_.File("notes")).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::filesystem::file_size(dir_.File("notes")), 9u);
  for (const char* torn : {"", "{\"i", R"({"id":"900-0","mode":"dense)"}) {
    dir_.Write("torn", torn);
    EXPECT_TRUE(NiahLog::Open(dir_.File("torn")).ok()) << torn;
    EXPECT_EQ(std::filesystem::file_size(dir_.File("torn")), 0u) << torn;
  }
}

// The offset moves what is evicted, and is in no tensor.
TEST_F(Grid, ALogOfAnotherOffsetIsRefused) {
  options_.modes = {"dms-bf16"};
  options_.resume = dir_.File("log");
  Run(options_);
  const std::string path = options_.engine.adapter_dir + "/dms_metadata.json";
  std::ifstream in(path);
  Json metadata = Json::parse(in);
  metadata["dms_initial_alpha_offset"] = metadata.value("dms_initial_alpha_offset", 5.0) + 1;
  std::ofstream(path) << metadata;
  const absl::Status status = RunGrid(options_, tasks_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("mode dms-bf16 had other weights"));
}

TEST_F(Grid, MistakesAreNamed) {
  const auto error = [&] {
    const absl::Status status = RunGrid(options_, tasks_).status();
    EXPECT_FALSE(status.ok());
    return std::string(status.message());
  };
  options_.modes = {"dense-fp9"};
  EXPECT_THAT(error(), HasSubstr("dense-fp9"));
  options_.modes = {"dms-fp8"};
  options_.engine.adapter_dir.clear();
  EXPECT_THAT(error(), HasSubstr("dms-fp8: "));
  options_.modes = {};
  tasks_[0].prompt_ids[0] = 70000;
  EXPECT_THAT(error(), HasSubstr("task " + tasks_[0].id + ": prompt token 70000"));
  tasks_[3].max_new_tokens = 2000;
  EXPECT_THAT(error(), HasSubstr("task " + tasks_[3].id));
}

}  // namespace
}  // namespace winnow::cli
