#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace winnow {

struct SamplingParams {
  float temperature = 0.0f;  // divides the logits; [0, 100]; 0 is greedy
  int top_k = 0;             // keeps the k largest logits; [0, vocab]; 0 keeps all
  float top_p = 1.0f;        // keeps the fewest tokens whose probabilities reach it; (0, 1]
};

// INVALID_ARGUMENT, naming field and value, unless every field is in the range stated
// above. `vocab` is the number of logits.
absl::Status ValidateSamplingParams(const SamplingParams& params, int vocab);

// Which random number: the same key gives the same one in every process, batch and
// topology.
struct SampleKey {
  uint64_t seed = 0;          // the request's
  uint64_t position = 0;      // of the token to be chosen, counted from the prompt's start
  uint32_t sample_index = 0;  // of the sample among those of one request
};

// The next token's id. Greedy: the largest logit, the lowest id among equals.
// Otherwise, in this order: temperature, top-k, top-p, then one draw from what is
// left, renormalised. Tokens are ranked by logit, equals by ascending id, and top-k
// keeps exactly k of them. Weights are integers (sample_math.h), the largest 2^43, so a
// token 2^-44 times as likely as the likeliest is never chosen; nor is a logit of -inf.
//   INVALID_ARGUMENT  params are out of range, or more than 2^20 logits.
//   INTERNAL          a logit is NaN or +inf, all are -inf or there are none: the model
//                     computed rubbish. The message names the first such id.
// Thread-safe. Greedy allocates nothing, else 8 bytes for each logit.
absl::StatusOr<int32_t> Sample(absl::Span<const float> logits, const SamplingParams& params,
                               const SampleKey& key);

}  // namespace winnow
