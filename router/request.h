#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "router/served_model.h"
#include "winnow/v1/inference.pb.h"

namespace winnow::router {

// A GenerateRequest that passed every check, with every default filled in.
struct ResolvedRequest {
  std::string request_id;
  std::vector<int32_t> prompt_ids;  // 1 to max_model_len - 1
  v1::ResolvedSampling sampling;
  std::vector<std::string> stop;  // stop strings
  bool skip_special_tokens = true;
  bool return_prompt_token_ids = false;
};

// Checks `request` against the ranges that inference.proto and types.proto state,
// renders, tokenizes, and takes what is unset from the model's generation_config.json.
// `max_model_len` bounds prompt and completion together; `drawn_seed` is used when the
// request has none.
//   INVALID_ARGUMENT    a field is out of range (reason INVALID_FIELD), the prompt does
//                       not fit (PROMPT_TOO_LONG), or a sampling field that is known by
//                       name only asks for something (UNSUPPORTED_SAMPLING).
//   UNIMPLEMENTED       chat for a model whose template is not known.
//   RESOURCE_EXHAUSTED  as Tokenizer::Encode.
absl::StatusOr<ResolvedRequest> ResolveRequest(const v1::GenerateRequest& request,
                                               const ServedModel& model, int max_model_len,
                                               uint64_t drawn_seed);

}  // namespace winnow::router
