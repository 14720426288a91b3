#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "winnow/v1/inference.pb.h"

namespace winnow::cli {

// What became of one input.
struct Result {
  std::vector<int32_t> prompt_ids;
  std::vector<int32_t> token_ids;
  std::string text;
  v1::FinishReason finish_reason = v1::FINISH_REASON_UNSPECIFIED;
  std::optional<v1::KvUsage> kv;  // unset: not reported
  absl::Status status;
  absl::Duration time_to_first_token;
  absl::Duration decode_time;  // from the first token to the last

  // Adds one message of the stream, which came `since_start` after the request went out.
  void Add(const v1::GenerateResponse& response, absl::Duration since_start);
};

// One line of --json, without the newline: prompt_ids, token_ids, text, finish_reason,
// kv_bytes; of a request that failed, error and message beside what had come.
std::string JsonLine(const Result& result);

// The table of --stats, over all results that ended well.
std::string StatsTable(const std::vector<Result>& results, absl::Duration wall_time);

}  // namespace winnow::cli
