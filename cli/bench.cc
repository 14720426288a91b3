#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "cli/bench_engine.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "common/base/log.h"
#include "common/base/status_macros.h"
#include "common/config/config.h"
#include "common/config/flags.h"
#include "common/kv/kv_mode.h"

namespace winnow::cli {
namespace {

absl::StatusOr<std::vector<int>> ParseList(const std::string& name, const std::string& text) {
  std::vector<int> values;
  for (absl::string_view part : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    int value = 0;
    if (!absl::SimpleAtoi(part, &value) || value < 0 || value > (1 << 20)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", name, ": '", part, "' is not a number in [0, 1048576]"));
    }
    values.push_back(value);
  }
  return values;
}

}  // namespace

int RunBench(int argc, char** argv, int first) {
  if (argc <= first || std::string(argv[first]) != "engine") {
    std::fprintf(stderr, "winnow bench: the one benchmark is 'winnow bench engine'\n");
    return 2;
  }
  BenchOptions options;
  std::string model = "default", adapter = "default", json;
  std::string prompts = "512", depths = "0", batches = "1";
  int threads = 0, seed = 1;
  uint64_t budget = uint64_t{2} << 30;
  config::FlagSet flags("winnow bench engine [flags]",
                        "Times prefill and decode in one process, without network.");
  flags.AddString("model", &model, "model directory in Hugging Face layout, or 'default'");
  flags.AddString("adapter", &adapter, config::kAdapterHelp);
  flags.AddChoice("kv-mode", &options.runtime.kv_mode, KvModeNames(), "KV cache mode");
  flags.AddChoice("kv-format", &options.runtime.kv_format, KvFormatNames(),
                  "takes the place of the format in --kv-mode");
  flags.AddBytes("kv-budget", &budget, "KV memory, allocated at start");
  flags.AddString("prompts", &prompts, "comma list of prompt lengths to prefill, tokens");
  flags.AddString("depths", &depths, "comma list of cache depths to decode at, tokens");
  flags.AddString("batches", &batches, "comma list of sequences decoded together");
  flags.AddInt("generate", &options.generate, 1, 1 << 20, "tokens decoded a sequence");
  flags.AddInt("repetitions", &options.repetitions, 1, 1000, "runs; the median is reported");
  flags.AddInt("prefill-chunk", &options.runtime.prefill_chunk, 1, 65536,
               "prompt tokens computed together");
  flags.AddInt("threads", &threads, 0, 1024, "CPU threads; 0: one a core");
  flags.AddInt("seed", &seed, 0, 1 << 30, "of the random prompts");
  flags.AddString("json", &json, "write the result to this file too");
  if (const auto code = config::ParseOrExitCode(&flags, "winnow bench", argc, argv, first + 1)) {
    return *code;
  }
  SetLogLevel(LogLevel::kWarning);
  options.runtime.model_dir = config::ResolveModelDir(model);
  options.runtime.adapter_dir = config::ResolveAdapterDir(model, adapter);
  options.runtime.kv_budget_bytes = budget;
  options.runtime.threads =
      threads > 0 ? threads : static_cast<int>(std::thread::hardware_concurrency());
  options.seed = static_cast<uint64_t>(seed);
  const auto run = [&]() -> absl::StatusOr<nlohmann::ordered_json> {
    WINNOW_ASSIGN_OR_RETURN(options.prompts, ParseList("prompts", prompts));
    WINNOW_ASSIGN_OR_RETURN(options.depths, ParseList("depths", depths));
    WINNOW_ASSIGN_OR_RETURN(options.batches, ParseList("batches", batches));
    return BenchEngine(options);
  };
  const absl::StatusOr<nlohmann::ordered_json> result = run();
  if (!result.ok()) return PrintError(result.status());
  std::printf("%s, %s, %d threads, CPU path %s\n%s", options.runtime.model_dir.c_str(),
              (*result)["kv_mode"].get<std::string>().c_str(), options.runtime.threads,
              (*result)["cpu_path"].get<std::string>().c_str(), BenchTable(*result).c_str());
  return WriteJson(json, *result);
}

}  // namespace winnow::cli
