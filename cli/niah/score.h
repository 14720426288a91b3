#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "cli/niah/task.h"

namespace winnow::cli {

struct Interval {
  double low = 0, high = 1;
};
// The 95 % Wilson score interval of the rate behind `successes` of `trials`; [0, 1] for
// no trial. REQUIRES: 0 <= successes <= trials.
Interval WilsonInterval(int64_t successes, int64_t trials);

// What a mode made of a task.
struct NiahResult {
  bool found = false;
  std::string text;  // the output
  int prompt_tokens = 0, new_tokens = 0;
  double ttft_s = 0, total_s = 0;
  uint64_t live_tokens = 0, logical_tokens = 0;    // at the end, as KvUsage
  uint64_t kv_bytes = 0, kv_bytes_dense_bf16 = 0;  // most held at once
};
nlohmann::ordered_json ResultJson(const NiahResult& result);

// A mode's results, one for each task in the same order.
struct NiahModeResults {
  std::string mode;
  std::vector<NiahResult> results;
};

// "modes": mode -> "all", "by_length", "by_depth" (in percent), "by_kind"; a group has
//   "tasks", "base_found", "found", "rate" with "rate_low", "rate_high"
//   "found_of_base"  tasks found here among base_found; "of_base", "_low", "_high"
//   "live_ratio"     logical / live tokens, pooled
//   "kv_bytes", "kv_bytes_dense_bf16"  means
//   "ttft_s" mean, "prefill_tokens_per_s", "decode_tokens_per_s"
// The first of `modes` is the base.
nlohmann::ordered_json Summarize(absl::Span<const NiahTask> tasks,
                                 absl::Span<const NiahModeResults> modes);

// Summarize()'s modes as a table, with lengths, kinds and depths.
std::string NiahTable(const nlohmann::ordered_json& modes);

}  // namespace winnow::cli
