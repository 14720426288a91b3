#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "cli/niah/filler.h"
#include "cli/niah/prompt.h"
#include "cli/niah/runner.h"

namespace winnow::cli {

struct OriginalOptions {
  NiahEngineOptions engine;
  std::vector<std::string> modes;  // dense-bf16 runs first, named or not
  std::vector<int> lengths;        // tokens of the text; cut where the model is shorter
  int iterations = 3;
  int max_new_tokens = 0;  // 0: 512 where the model thinks, else 128
  uint64_t seed = 1;
  bool progress = true;  // on standard error
};

// The text of the original benchmark: filler paragraphs, "The capital of Freedonia is
// Silverton." as a paragraph of its own about the middle, `tokens` tokens together.
//   INVALID_ARGUMENT  too few tokens for that.
absl::StatusOr<std::string> OriginalContext(const Tokenizer& tokenizer,
                                            absl::Span<const Sentence> filler, int tokens);

// True if `output` names Silverton, behind its thoughts if it has any.
bool OriginalCorrect(const std::string& output);

// The needle protocol that the DMS kernels' benchmark used: system message, text, one
// question, sampling at temperature 0.1, a warm-up of 512 + 32 tokens, then `iterations`
// runs of each (mode, form, length), forms as PromptMaker::forms().
//   "rows": [{"mode", "form", "length", "prompt_tokens",
//     "new_tokens", "ttft_s", "elapsed_s"  means over the iterations
//     "tokens_per_s"         new_tokens / elapsed_s
//     "decode_tokens_per_s"  new_tokens / (elapsed_s - ttft_s)
//     "kv_bytes", "kv_bytes_dense_bf16"  most held at once, from the allocator
//     "rss_bytes"            most that the process held, weights and all
//     "live_tokens", "logical_tokens", "live_ratio"  at the end of the last
//     "correct"              in any iteration; "correct_of" how many
//     "answers"              the outputs}]
//   INVALID_ARGUMENT  a bad option, by name; others as NiahRunner.
absl::StatusOr<nlohmann::ordered_json> RunOriginal(const OriginalOptions& options,
                                                   const PromptMaker& prompts,
                                                   absl::Span<const Sentence> filler);

// The rows as a table.
std::string OriginalTable(const nlohmann::ordered_json& rows);

}  // namespace winnow::cli
