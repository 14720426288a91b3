#pragma once

#include <nlohmann/json_fwd.hpp>

#include "absl/status/statusor.h"
#include "cli/eval/evaluate.h"

namespace winnow::cli {

// The protocol by which FastDMS publishes its quality: 4 prompts of 1024 tokens, 16 greedy
// tokens each. The prompts are the first windows of the text; the reference is dense-bf16
// with float32 activations (there it is a run of the same 8-bit cache without eviction).
//   "modes": { mode: {
//     "teacher_forced": the reference's tokens are given, each mode predicts them
//        "kld", "ppl", "ppl_base", "token_match" (most likely token is the given one), over
//        "scored" of "positions"
//     "free_running":   each mode goes its own way
//        "token_match"  share of the positions with the reference's token
//        "kld"          over the "scored" of "positions" before which both are the same
//        "first_difference"  [prompts] position, null where there is none
//     "live_ratio", "kv_bytes", "kv_bytes_dense_bf16"  after the last token, mean } }
// Uses model, adapter, text, modes, thresholds, activations, threads, chunk and progress of
// the options. Errors as Evaluate().
absl::StatusOr<nlohmann::ordered_json> EvaluateShort(const EvaluateOptions& options);

}  // namespace winnow::cli
