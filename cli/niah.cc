#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "cli/commands.h"
#include "cli/niah/facts.h"
#include "cli/niah/filler.h"
#include "cli/niah/grid.h"
#include "cli/niah/original.h"
#include "cli/niah/prompt.h"
#include "cli/niah/score.h"
#include "cli/niah/task.h"
#include "cli/output.h"
#include "common/base/log.h"
#include "common/base/status_macros.h"
#include "common/config/config.h"
#include "common/config/flags.h"

namespace winnow::cli {
namespace {

struct NiahFlags {
  std::string protocol = "grid";
  std::string model = "default", adapter = "default", modes = "dense-fp8";
  std::string ask = "raw", filler, lengths = "1024,2048,4096,8192", depths = "11",
              kinds = "single,facts";
  std::string tasks_in, tasks_out, resume, json;
  std::optional<int> tasks;
  int needles = 3, iterations = 3, seed = 1;
  int max_new_tokens = 0, prefill_chunk = 512, threads = 0;
  std::string effective;  // all of them as they are in force
};

config::FlagSet MakeFlags(NiahFlags* f) {
  config::FlagSet flags("winnow niah [flags]",
                        "Finds needles in long texts, in KV cache modes beside dense-bf16: how "
                        "many of those that the dense base finds each mode finds too.");
  flags.AddChoice("protocol", &f->protocol, {"grid", "original"},
                  "grid: many tasks over lengths, depths and kinds, greedy; original: one needle "
                  "at 50 % and sampling at temperature 0.1, as the DMS kernels' benchmark had it");
  flags.AddString("model", &f->model, "model directory in Hugging Face layout, or 'default'");
  flags.AddString("adapter", &f->adapter, config::kAdapterHelp);
  flags.AddString("modes", &f->modes,
                  "comma list of KV cache modes, a dms- mode's with a threshold of its own as "
                  "dms-fp8@-2; dense-bf16 is always run, and first");
  flags.AddString("filler", &f->filler,
                  "UTF-8 text file to hide needles in; empty: some paragraphs of our own");
  flags.AddString("lengths", &f->lengths,
                  "comma list of lengths, tokens: of the prompt and --max-new-tokens together "
                  "(grid), of the text alone (original); with --tasks-in only these are run");
  flags.AddString("depths", &f->depths,
                  "grid: how many depths, evenly from 0 to 100 %, or a comma list of at least two "
                  "percentages");
  flags.AddString("kinds", &f->kinds,
                  "grid: comma list of single (one number), facts (three kinds of facts, one asked "
                  "for) and multi (--needles numbers, all asked for)");
  flags.AddChoice("ask", &f->ask, {"raw", "chat"},
                  "grid: the prompt is a raw text that ends where a needle's answer begins, which "
                  "small models read best, or a question in the model's chat template");
  flags.AddInt("needles", &f->needles, 1, kMaxNumberFacts, "grid: numbers in a multi task");
  flags.AddOptionalInt("tasks", &f->tasks, 1, 1000000,
                       "grid: tasks a length (40 unless set); with --tasks-in at most the first "
                       "so many of each");
  flags.AddString("tasks-out", &f->tasks_out,
                  "grid: write the tasks to this file, a JSON object a line, and run nothing");
  flags.AddString("tasks-in", &f->tasks_in, "grid: run the tasks of this file");
  flags.AddString("resume", &f->resume,
                  "grid: keep each result in this file at once, and do not run again what is in "
                  "it already");
  flags.AddInt("iterations", &f->iterations, 1, 1000, "original: runs of each prompt");
  flags.AddInt("seed", &f->seed, 0, 1 << 30, "of the tasks (grid), of the sampling (original)");
  flags.AddInt("max-new-tokens", &f->max_new_tokens, 0, 1 << 20,
               "most tokens of an answer; 0: 24, more for multi (grid); 128, 512 where the model "
               "thinks (original)");
  flags.AddInt("prefill-chunk", &f->prefill_chunk, 1, 65536,
               "prompt tokens computed together; changes memory and speed, no answer");
  flags.AddInt("threads", &f->threads, 0, 1024, "CPU threads; 0: one a core");
  flags.AddString("json", &f->json, "write the result to this file too");
  return flags;
}

absl::StatusOr<std::vector<int>> ParseLengths(const std::string& text) {
  std::vector<int> lengths;
  for (const absl::string_view part : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    int value = 0;
    if (!absl::SimpleAtoi(part, &value) || value < 1 || value > (1 << 24)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--lengths: '", part, "' is not a number in [1, 16777216]"));
    }
    lengths.push_back(value);
  }
  if (lengths.empty()) return absl::InvalidArgumentError("--lengths is empty");
  return lengths;
}

// "5" is 0, 25, 50, 75, 100 %; "10,90" is those two.
absl::StatusOr<std::vector<double>> ParseDepths(const std::string& text) {
  std::vector<double> depths;
  const std::vector<std::string> parts = absl::StrSplit(text, ',', absl::SkipEmpty());
  if (parts.size() == 1) {
    int count = 0;
    if (!absl::SimpleAtoi(parts[0], &count) || count < 2 || count > 1001) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--depths: '", text, "' is neither a count in [2, 1001] nor a list of percentages"));
    }
    for (int i = 0; i < count; ++i) depths.push_back(static_cast<double>(i) / (count - 1));
    return depths;
  }
  for (const std::string& part : parts) {
    double percent = 0;
    if (!absl::SimpleAtod(part, &percent) || !(percent >= 0 && percent <= 100)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--depths: '", part, "' is not a percentage in [0, 100]"));
    }
    depths.push_back(percent / 100);
  }
  if (depths.empty()) return absl::InvalidArgumentError("--depths is empty");
  return depths;
}

absl::StatusOr<std::vector<NiahTask>> ReadTaskFile(const NiahFlags& f,
                                                   const std::optional<std::vector<int>>& lengths) {
  std::ifstream in(f.tasks_in, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat("--tasks-in ", f.tasks_in, ": cannot read it"));
  WINNOW_ASSIGN_OR_RETURN(const std::vector<NiahTask> all,
                          ReadTasks(in, absl::StrCat("--tasks-in ", f.tasks_in)));
  std::vector<NiahTask> tasks;
  std::map<int, int> taken;
  const std::set<int> wanted =
      lengths.has_value() ? std::set<int>(lengths->begin(), lengths->end()) : std::set<int>();
  for (const NiahTask& task : all) {
    if (lengths.has_value() && wanted.count(task.context) == 0) continue;
    if (f.tasks.has_value() && taken[task.context]++ >= *f.tasks) continue;
    tasks.push_back(task);
  }
  if (tasks.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tasks-in ", f.tasks_in, " has no task of --lengths=", f.lengths));
  }
  return tasks;
}

absl::StatusOr<std::vector<NiahTask>> GridTasks(const NiahFlags& f, bool lengths_set) {
  WINNOW_ASSIGN_OR_RETURN(std::vector<int> lengths, ParseLengths(f.lengths));
  if (!f.tasks_in.empty()) {
    return ReadTaskFile(f, lengths_set ? std::optional(lengths) : std::nullopt);
  }
  WINNOW_ASSIGN_OR_RETURN(const std::vector<Sentence> filler, LoadFiller(f.filler));
  WINNOW_ASSIGN_OR_RETURN(const PromptMaker prompts,
                          PromptMaker::Load(config::ResolveModelDir(f.model)));
  NiahTaskOptions options{.lengths = std::move(lengths),
                          .tasks = f.tasks.value_or(40),
                          .kinds = absl::StrSplit(f.kinds, ',', absl::SkipEmpty()),
                          .form = f.ask == "chat" ? prompts.short_form() : PromptForm::kRaw,
                          .needles = f.needles,
                          .max_new_tokens = f.max_new_tokens,
                          .seed = static_cast<uint64_t>(f.seed)};
  WINNOW_ASSIGN_OR_RETURN(options.depths, ParseDepths(f.depths));
  return MakeTasks(options, prompts, filler);
}

NiahEngineOptions EngineFlags(const NiahFlags& f) {
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return {.model_dir = config::ResolveModelDir(f.model),
          .adapter_dir = config::ResolveAdapterDir(f.model, f.adapter),
          .prefill_chunk = f.prefill_chunk,
          .threads = f.threads > 0 ? f.threads : cores};
}

// Prints `table` and writes what ran, then `result`, to --json.
int Report(const NiahFlags& f, const std::string& table, const nlohmann::ordered_json& result) {
  std::fputs(table.c_str(), stdout);
  nlohmann::ordered_json json = {{"protocol", f.protocol},
                                 {"version", config::Version()},
                                 {"model", config::ResolveModelDir(f.model)},
                                 {"adapter", f.adapter},
                                 {"flags", f.effective}};
  json.update(result);
  return WriteJson(f.json, json);
}

int RunGridProtocol(const NiahFlags& f, bool lengths_set) {
  const absl::StatusOr<std::vector<NiahTask>> tasks = GridTasks(f, lengths_set);
  if (!tasks.ok()) return PrintError(tasks.status());
  if (!f.tasks_out.empty()) {
    std::string lines;
    for (const NiahTask& task : *tasks) absl::StrAppend(&lines, TaskLine(task), "\n");
    const absl::Status status = WriteFile(f.tasks_out, lines);
    return status.ok() ? 0 : PrintError(status);
  }
  const GridOptions options{.engine = EngineFlags(f),
                            .modes = absl::StrSplit(f.modes, ',', absl::SkipEmpty()),
                            .resume = f.resume};
  const absl::StatusOr<nlohmann::ordered_json> result = RunGrid(options, *tasks);
  if (!result.ok()) return PrintError(result.status());
  return Report(f, NiahTable((*result)["modes"]), *result);
}

int RunOriginalProtocol(const NiahFlags& f) {
  const auto run = [&]() -> absl::StatusOr<nlohmann::ordered_json> {
    WINNOW_ASSIGN_OR_RETURN(const std::vector<Sentence> filler, LoadFiller(f.filler));
    WINNOW_ASSIGN_OR_RETURN(const PromptMaker prompts,
                            PromptMaker::Load(config::ResolveModelDir(f.model)));
    OriginalOptions options{.engine = EngineFlags(f),
                            .modes = absl::StrSplit(f.modes, ',', absl::SkipEmpty()),
                            .lengths = {},
                            .iterations = f.iterations,
                            .max_new_tokens = f.max_new_tokens,
                            .seed = static_cast<uint64_t>(f.seed)};
    WINNOW_ASSIGN_OR_RETURN(options.lengths, ParseLengths(f.lengths));
    return RunOriginal(options, prompts, filler);
  };
  const absl::StatusOr<nlohmann::ordered_json> result = run();
  if (!result.ok()) return PrintError(result.status());
  return Report(f, OriginalTable((*result)["rows"]), *result);
}

}  // namespace

int RunNiah(int argc, char** argv, int first) {
  NiahFlags values;
  config::FlagSet flags = MakeFlags(&values);
  if (const auto code = config::ParseOrExitCode(&flags, "winnow niah", argc, argv, first)) {
    return *code;
  }
  SetLogLevel(LogLevel::kWarning);
  values.effective = flags.Effective();
  const bool original = values.protocol == "original";
  for (const char* name :
       {"ask", "depths", "kinds", "needles", "tasks", "tasks-in", "tasks-out", "resume"}) {
    if (original && flags.IsSet(name)) {
      std::fprintf(stderr, "winnow niah: --%s is of --protocol grid\n", name);
      return 2;
    }
  }
  for (const char* name :
       {"tasks-out", "ask", "depths", "filler", "kinds", "max-new-tokens", "needles", "seed"}) {
    if (!values.tasks_in.empty() && flags.IsSet(name)) {
      std::fprintf(stderr, "winnow niah: --%s makes tasks, and --tasks-in has them made\n", name);
      return 2;
    }
  }
  return original ? RunOriginalProtocol(values) : RunGridProtocol(values, flags.IsSet("lengths"));
}

}  // namespace winnow::cli
