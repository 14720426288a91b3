#include "cli/niah/grid.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "cli/eval/modes.h"
#include "cli/niah/log.h"
#include "cli/niah/score.h"
#include "common/base/status_macros.h"

namespace winnow::cli {
namespace {

using Json = nlohmann::ordered_json;

// The tokens that hold every task; an error if the model does not.
absl::StatusOr<int> MaxLength(absl::Span<const NiahTask> tasks, const ModelConfig& config) {
  int longest = 2;
  for (const NiahTask& task : tasks) {
    const int64_t length = static_cast<int64_t>(task.prompt_ids.size()) + task.max_new_tokens;
    if (length > config.max_position_embeddings) {
      return absl::InvalidArgumentError(absl::StrCat(
          "task ", task.id, ": ", task.prompt_ids.size(), " prompt tokens and max_new_tokens=",
          task.max_new_tokens, " are more than the model's ", config.max_position_embeddings));
    }
    longest = std::max(longest, static_cast<int>(length));
  }
  return longest;
}

absl::StatusOr<NiahResult> RunTask(const NiahTask& task, NiahRunner* runner) {
  const absl::StatusOr<NiahOutput> output =
      runner->Run(task.prompt_ids, task.max_new_tokens, SamplingParams{}, /*seed=*/0);
  if (!output.ok()) {
    return absl::Status(
        output.status().code(),
        absl::StrCat("task ", task.id, ": ", std::string(output.status().message())));
  }
  return NiahResult{.found = Found(task, output->text),
                    .text = output->text,
                    .prompt_tokens = static_cast<int>(task.prompt_ids.size()),
                    .new_tokens = static_cast<int>(output->ids.size()),
                    .ttft_s = absl::ToDoubleSeconds(output->first_token),
                    .total_s = absl::ToDoubleSeconds(output->total),
                    .live_tokens = output->kv.live_tokens,
                    .logical_tokens = output->kv.logical_tokens,
                    .kv_bytes = output->kv.peak_bytes,
                    .kv_bytes_dense_bf16 = output->kv.dense_bf16_bytes};
}

absl::StatusOr<NiahModeResults> RunMode(const GridOptions& options, const std::string& mode,
                                        absl::Span<const NiahTask> tasks, int max_len,
                                        NiahLog* log) {
  WINNOW_ASSIGN_OR_RETURN(std::unique_ptr<NiahRunner> runner,
                          NiahRunner::Create(options.engine, mode, max_len));
  const std::string weights = runner->Describe();
  NiahModeResults out{.mode = mode, .results = {}};
  size_t found = 0;
  for (const NiahTask& task : tasks) {
    WINNOW_ASSIGN_OR_RETURN(const NiahResult* known, log->Find(task, mode, weights));
    if (known != nullptr) {
      out.results.push_back(*known);
    } else {
      WINNOW_ASSIGN_OR_RETURN(NiahResult result, RunTask(task, runner.get()));
      WINNOW_RETURN_IF_ERROR(log->Append(task, mode, weights, result));
      out.results.push_back(std::move(result));
    }
    const NiahResult& result = out.results.back();
    found += result.found ? 1 : 0;
    if (options.progress) {
      std::fprintf(stderr, "%s %zu/%zu %s %s%s, found %zu so far\n", mode.c_str(),
                   out.results.size(), tasks.size(), task.id.c_str(),
                   result.found ? "found" : "missed", known != nullptr ? " (resumed)" : "", found);
    }
  }
  return out;
}

}  // namespace

absl::StatusOr<Json> RunGrid(const GridOptions& options, absl::Span<const NiahTask> tasks) {
  WINNOW_ASSIGN_OR_RETURN(const std::vector<std::string> modes, BaseAndModes(options.modes));
  WINNOW_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.engine.model_dir));
  WINNOW_ASSIGN_OR_RETURN(const int max_len, MaxLength(tasks, config));
  WINNOW_ASSIGN_OR_RETURN(const std::unique_ptr<NiahLog> log, NiahLog::Open(options.resume));
  std::vector<NiahModeResults> results;
  for (const std::string& mode : modes) {
    absl::StatusOr<NiahModeResults> result = RunMode(options, mode, tasks, max_len, log.get());
    if (!result.ok()) {
      return absl::Status(result.status().code(),
                          absl::StrCat(mode, ": ", std::string(result.status().message())));
    }
    results.push_back(*std::move(result));
  }
  Json rows = Json::array();
  for (size_t i = 0; i < tasks.size(); ++i) {
    Json row = {{"id", tasks[i].id},
                {"kind", tasks[i].kind},
                {"context", tasks[i].context},
                {"depth", tasks[i].depth},
                {"answers", tasks[i].answers}};
    for (const NiahModeResults& mode : results) {
      row["results"][mode.mode] = ResultJson(mode.results[i]);
    }
    rows.push_back(std::move(row));
  }
  return Json{{"modes", Summarize(tasks, results)}, {"tasks", std::move(rows)}};
}

}  // namespace winnow::cli
