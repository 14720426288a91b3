#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/engine/runtime.h"

namespace winnow::cli {

struct BenchOptions {
  RuntimeOptions runtime;            // max_num_seqs and max_model_len are set to fit
  std::vector<int> prompts = {512};  // prefill: prompt lengths, tokens
  std::vector<int> depths = {0};     // decode: tokens in the cache before the first timed one
  std::vector<int> batches = {1};    // decode: sequences
  int generate = 64;                 // decode: timed tokens a sequence
  int repetitions = 3;               // the median is reported
  uint64_t seed = 1;                 // of the random prompt
};

// Times one process without network. Rows
//   {"test": "prefill", "tokens", "seconds", "tokens_per_second", "kv_bytes"}
//   {"test": "decode", "depth", "batch", "generated", "seconds", "tokens_per_second",
//    "kv_bytes"}
// with the median of the repetitions and the spread ("seconds_min", "seconds_max").
// A prefill computes the logits of its last token; a decode row picks the most likely
// token each step. Errors as Runtime::Create().
absl::StatusOr<nlohmann::ordered_json> BenchEngine(const BenchOptions& options);

// The rows as a table for people.
std::string BenchTable(const nlohmann::ordered_json& result);

}  // namespace winnow::cli
