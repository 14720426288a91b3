#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/eval/windows.h"

namespace winnow::cli {

struct EvaluateOptions {
  std::string model_dir;
  std::string adapter_dir;                         // empty: none
  std::string text_file;                           // UTF-8, any text
  std::vector<std::string> modes = {"dense-fp8"};  // ParseEvalModes()
  std::vector<float> thresholds;                   // likewise
  std::vector<int> contexts = {2048};              // tokens of a window; [2, model length] each
  int windows = 1;
  Scoring scoring = Scoring::kAll;
  int stride = 0;       // tokens; kStride only
  int decode_tail = 0;  // last tokens of a window that are decoded one by one; no figure changes
  int prefill_chunk = 256;  // at most 512 count; changes no figure
  int threads = 1;
  bool bf16_activations = false;  // default: float32, so that the run adds no noise
  bool noise = true;              // measure what BF16 activations alone do to dense-bf16
  // Where a run leaves its sums after each window, "": nowhere. The caller deletes it when
  // it has kept the result.
  std::string resume_file;
  std::string dump_file;  // WriteDump() of the first window; "": none
  bool progress = true;   // on standard error
};

// Scores windows of a text in every mode against mode dense-bf16 in lockstep:
//   "modes": { mode: {
//     "nll", "nll_base"  mean negative log-likelihood, nats a token; "ppl", "ppl_base" exp of it
//     "kld"              mean KL(dense-bf16 || mode), nats a token
//     "top1"             share of positions with the same most likely token
//     "positions"        scored
//     "evict_rate"       share of (token, layer, KV head) flagged for eviction, window or not
//     "live_ratio"       logical tokens / live tokens at the windows' ends
//     "kv_bytes", "kv_bytes_dense_bf16"  held at a window's end, from the allocator, mean
//     "by_position"      the same means for tokens at positions [0, 512), [512, 1024), ... doubling
//     "memory"           live tokens and bytes after every 512 tokens, mean over the windows
//     "keep_rate", "live_per_layer_head"  [layers][heads], all windows
//     "kept_per_layer_head"  [layers][heads] tokens flagged to keep, first window; the
//                        newest token, whose bit is not known, counts as kept
//     "dms_threshold"    dms- modes only } },
//   "noise": {...}       dense-bf16 with BF16 activations against float32 ones
// with "model", "adapter", "text", "context", "windows", ..., "version". Several contexts:
// "contexts" is a list of { "context", "modes", "noise" } instead.
//   NOT_FOUND, INVALID_ARGUMENT  text too short, bad option, by name
//   FAILED_PRECONDITION          resume_file is of another evaluation
//   others                       as Runtime
absl::StatusOr<nlohmann::ordered_json> Evaluate(const EvaluateOptions& options);

}  // namespace winnow::cli
