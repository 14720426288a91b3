#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "cli/niah/runner.h"
#include "cli/niah/task.h"

namespace winnow::cli {

struct GridOptions {
  NiahEngineOptions engine;
  std::vector<std::string> modes;  // dense-bf16 runs first, named or not
  std::string resume;              // file of NiahLog; "": none
  bool progress = true;            // a line a task on standard error
};

// Runs `tasks` greedily, one at a time, in dense-bf16 and then in each mode.
//   "modes"  as Summarize(), base first
//   "tasks"  [{"id", "kind", "context", "depth", "answers", "results": mode -> ResultJson()}]
//   INVALID_ARGUMENT     a task that is too long for the model, by id, or an unknown mode.
//   FAILED_PRECONDITION  as NiahLog::Find(); others as NiahRunner.
absl::StatusOr<nlohmann::ordered_json> RunGrid(const GridOptions& options,
                                               absl::Span<const NiahTask> tasks);

}  // namespace winnow::cli
