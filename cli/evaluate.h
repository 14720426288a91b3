#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace winnow::cli {

struct EvaluateOptions {
  std::string model_dir;
  std::string adapter_dir;  // empty: none
  std::string text_file;
  int context = 2048;  // tokens of a window; [2, model length]
  int windows = 1;     // consecutive, from the start of the text
  std::vector<std::string> modes = {"dense-fp8"};
  int prefill_chunk = 256;  // changes no figure
  int threads = 1;
  bool bf16_activations = false;  // default: float32, so that the run adds no noise
  bool progress = true;           // one line a window on standard error
};

// Scores the first `windows` windows of `context` tokens of a text, no BOS, all
// context - 1 predictions of each, in every mode, against mode dense-bf16 in lockstep:
//   "modes": { mode: {
//     "nll", "nll_base"  mean negative log-likelihood, nats a token; "ppl", "ppl_base" exp of it
//     "kld"              mean KL(dense-bf16 || mode), nats a token
//     "top1"             share of positions with the same most likely token
//     "evict_rate"       share of (token, layer, KV head) flagged for eviction, window or not
//     "kept_per_layer_head"  [layers][heads] tokens flagged to keep, first window; the
//                        newest token, whose bit is not known, counts as kept
//     "live_ratio"       logical tokens / live tokens at the windows' ends
//     "kv_bytes", "kv_bytes_dense_bf16"  held at a window's end, from the allocator, mean
//     "positions"        scored } }
// with "model", "adapter", "text", "context", "windows", "activations", "version".
//   NOT_FOUND, INVALID_ARGUMENT  text too short, bad option, by name; others as Runtime.
absl::StatusOr<nlohmann::ordered_json> Evaluate(const EvaluateOptions& options);

}  // namespace winnow::cli
