#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace winnow::cli {

// What every other mode is compared with.
inline constexpr char kBaseMode[] = "dense-bf16";

// One way of keeping the cache, as an evaluation names it.
struct EvalMode {
  std::string name;     // the key in the result
  std::string kv_mode;  // for Runtime
  bool dms = false;     // a dms- mode
  float threshold = 0;  // RuntimeOptions::dms_threshold; 0 in dense modes
};

// A mode's name is a KV mode, or a dms- mode at a threshold of its own: "dms-fp8@-2".
// A dms- mode without one runs at each of `thresholds` (empty: 0), under its plain name
// if there is one threshold, else under NAME@THRESHOLD.
//   INVALID_ARGUMENT  no name; an unknown or repeated one; a threshold that is no number,
//                     outside [-1e6, 1e6] or given to a dense mode.
absl::StatusOr<std::vector<EvalMode>> ParseEvalModes(const std::vector<std::string>& names,
                                                     const std::vector<float>& thresholds);

// kBaseMode, then `names` without those that came before. Errors as ParseEvalModes().
absl::StatusOr<std::vector<std::string>> BaseAndModes(const std::vector<std::string>& names);

}  // namespace winnow::cli
