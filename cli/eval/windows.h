#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace winnow::cli {

// A stretch of the text that a model sees as one sequence.
struct EvalWindow {
  int64_t begin = 0;     // first token in the text
  int length = 0;        // tokens
  int first_target = 1;  // tokens [first_target, length) are predicted and scored
};

// How a text is cut. No BOS anywhere.
//   kAll     windows one after the other, all predictions of each scored
//   kHalf    the same windows, targets from length / 2 + 1 on (llama.cpp's perplexity)
//   kStride  windows `stride` apart, each scores what no earlier one did (Hugging Face's
//            perplexity of a fixed-length model)
enum class Scoring { kAll, kHalf, kStride };

// The first `count` windows of `context` tokens. With kStride the windows overlap by
// context - stride.
//   INVALID_ARGUMENT  context < 2, count < 1, a stride outside [1, context]; or the text of
//                     `num_tokens` tokens is too short, saying by how much.
absl::StatusOr<std::vector<EvalWindow>> PlanWindows(int64_t num_tokens, int context, int count,
                                                    Scoring scoring, int stride);

}  // namespace winnow::cli
