#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_served.h"

namespace winnow::cli {
namespace {

using ::testing::HasSubstr;

struct Outcome {
  int code = 0;
  std::string out, err;
};

Outcome Niah(std::vector<std::string> args) {
  args.insert(args.begin(), {"winnow", "niah"});
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  Outcome outcome;
  outcome.code = RunNiah(static_cast<int>(argv.size()), argv.data(), 2);
  outcome.out = ::testing::internal::GetCapturedStdout();
  outcome.err = ::testing::internal::GetCapturedStderr();
  return outcome;
}

TEST(NiahCommand, HelpNamesEachFlag) {
  const Outcome help = Niah({"--help"});
  EXPECT_EQ(help.code, 0);
  for (const char* flag :
       {"protocol",   "model", "adapter",        "modes",         "filler",    "lengths",  "depths",
        "kinds",      "ask",   "needles",        "tasks",         "tasks-out", "tasks-in", "resume",
        "iterations", "seed",  "max-new-tokens", "prefill-chunk", "threads",   "json"}) {
    EXPECT_THAT(help.out, HasSubstr(std::string("  --") + flag)) << flag;
  }
}

TEST(NiahCommand, MistakesNameFlagAndValue) {
  const testing::TinyServed model;
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{"--nedles", "3"}, "nedles"},
      {{"--protocol", "mine"}, "mine"},
      {{"--needles", "17"}, "17"},
      {{"--tasks", "0"}, "0"},
      {{"--protocol", "original", "--depths", "5"}, "--depths is of --protocol grid"},
      {{"--tasks-in", "a", "--tasks-out", "b"}, "--tasks-out makes tasks"},
      {{"--tasks-in", "a", "--kinds", "single"}, "--kinds makes tasks"},
      {{"--lengths", "1k"}, "--lengths: '1k'"},
      {{"--lengths", ""}, "--lengths is empty"},
      {{"--depths", "1"}, "--depths: '1'"},
      {{"--depths", "0,101"}, "--depths: '101'"},
      {{"--depths", "0,nan"}, "--depths: 'nan'"},
      {{"--kinds", "hay", "--lengths", "900"}, "--kinds: 'hay'"},
      {{"--filler", "/nowhere"}, "--filler /nowhere"},
      {{"--tasks-in", "/nowhere"}, "--tasks-in /nowhere"},
      {{"--lengths", "4096"}, "--lengths: 4096"},
      {{"--tasks-out", "/nowhere/tasks", "--lengths", "900"}, "/nowhere/tasks"},
      {{"--modes", "dense-fp9", "--lengths", "900"}, "dense-fp9"},
      {{"--model", "/nowhere"}, "/nowhere"},
      {{"--protocol", "original", "--lengths", "5"}, "--lengths: 5"}};
  for (const auto& [args, message] : cases) {
    std::vector<std::string> all = {"--model", model.dir()};
    all.insert(all.end(), args.begin(), args.end());
    const Outcome outcome = Niah(all);
    EXPECT_NE(outcome.code, 0) << message;
    EXPECT_THAT(outcome.err, HasSubstr(message));
    EXPECT_EQ(outcome.out, "") << message;
  }
}

TEST(NiahCommand, WritesTasksThenRunsThem) {
  const testing::TinyServed model{{}, {.window = 32}};
  const testing::TempDir dir;
  const std::string tasks = dir.File("tasks.jsonl"), json = dir.File("out.json");
  const Outcome made = Niah({"--model", model.dir(), "--tasks-out", tasks, "--lengths", "700,900",
                             "--tasks", "4", "--depths", "0,50,100", "--max-new-tokens", "4"});
  EXPECT_EQ(made.code, 0) << made.err;
  EXPECT_EQ(made.out, "");
  const Outcome run = Niah({"--model", model.dir(), "--adapter", model.adapter_dir(), "--modes",
                            "dms-fp8", "--tasks-in", tasks, "--tasks", "3", "--lengths", "900",
                            "--threads", "1", "--json", json});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("of those the base finds"));
  EXPECT_THAT(run.err, HasSubstr("dms-fp8 3/3 900-"));
  const auto result = nlohmann::ordered_json::parse(testing::ReadWholeFile(json));
  EXPECT_EQ(result["protocol"], "grid");
  EXPECT_THAT(result["flags"].get<std::string>(), HasSubstr(" lengths=900 "));
  EXPECT_EQ(result["tasks"].size(), 3u);
  EXPECT_EQ(result["tasks"][0]["context"], 900);
  EXPECT_EQ(result["modes"]["dms-fp8"]["by_length"]["900"]["tasks"], 3);
  EXPECT_NE(Niah({"--model", model.dir(), "--tasks-in", tasks, "--lengths", "800"}).code, 0);
}

TEST(NiahCommand, OriginalPrintsATableAndSaysThatThereIsOneForm) {
  const testing::TinyServed model;
  const testing::TempDir dir;
  const std::string json = dir.File("out.json");
  const Outcome run = Niah({"--protocol", "original", "--model", model.dir(), "--modes",
                            "dense-fp8", "--lengths", "1300", "--iterations", "1",
                            "--max-new-tokens", "3", "--threads", "1", "--json", json});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.err, HasSubstr("does not know enable_thinking: one form (chat)"));
  EXPECT_THAT(run.out, HasSubstr("dense-bf16  chat"));
  const auto result = nlohmann::ordered_json::parse(testing::ReadWholeFile(json));
  EXPECT_EQ(result["protocol"], "original");
  EXPECT_EQ(result["rows"].size(), 2u);
}

}  // namespace
}  // namespace winnow::cli
