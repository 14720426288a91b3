#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "kernels/dms_compact.h"

namespace winnow {

// What a checkpoint or an adapter says about its DMS.
struct DmsConfig {
  int window = 256;  // W: a token up to this distance is always visible; >= 1
  int shift = 1;     // 1: the bit of token t decides token t - 1 (NVIDIA); 0: token t (FastDMS)
  kernels::DecisionRule rule;
};

// Reads DMS keys from the text of dms_metadata.json (there also under "config")
// or config.json. Keys, with their aliases and defaults:
//   dms_window_size, window_size               512 where the model has q-norm, else 256
//   dms_alpha_scale, alpha_scale               100
//   dms_initial_alpha_offset, dms_alpha_offset, alpha_offset   5
//   dms_separate_alpha                         false: the borrowed query channel
//   dms_alpha_per                              "head" ("layer": head 0's bit for all)
//   dms_logit_source                           "q_norm" where the model has q-norm, else "q";
//                                              "proj_alpha" with dms_separate_alpha
//   dms_decision_shift                         0 for "q", else 1
//   dms_zero_channel                           "both" for "q_norm", "before_rope" for "q", else
//                                              "none"
// `has_q_norm`: the model's architecture has q-norm (Qwen3). nullopt if there is
// no window, scale, offset nor dms_cr. INVALID_ARGUMENT, naming the field, for
// text that is not a JSON object or a value out of range.
absl::StatusOr<std::optional<DmsConfig>> ParseDmsConfig(std::string_view json, bool has_q_norm);

// The rule as one word, the same only for rules that compute the same: "logits*100-7",
// "q_norm*100-5/layer/zero_both". kNone is "" where no channel is zeroed.
std::string DescribeRule(const kernels::DecisionRule& rule);

// Looks in adapter_dir ("": none) for dms_metadata.json, which must be there and
// name a DMS key; else in model_dir for dms_metadata.json, then config.json.
// nullopt: no DMS. NOT_FOUND if an adapter directory lacks the file.
absl::StatusOr<std::optional<DmsConfig>> LoadDmsConfig(const std::string& model_dir,
                                                       const std::string& adapter_dir,
                                                       bool has_q_norm);

}  // namespace winnow
