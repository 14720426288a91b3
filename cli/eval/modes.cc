#include "cli/eval/modes.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status_macros.h"
#include "common/kv/kv_mode.h"

namespace winnow::cli {

absl::StatusOr<std::vector<EvalMode>> ParseEvalModes(const std::vector<std::string>& names,
                                                     const std::vector<float>& thresholds) {
  std::vector<EvalMode> modes;
  const auto add = [&modes](EvalMode mode) -> absl::Status {
    if (!(std::abs(mode.threshold) <= 1e6f)) {
      return absl::InvalidArgumentError(absl::StrCat("mode ", mode.name, ": the threshold ",
                                                     mode.threshold, " is outside [-1e6, 1e6]"));
    }
    for (const EvalMode& other : modes) {
      if (other.name == mode.name) {
        return absl::InvalidArgumentError(absl::StrCat("mode ", mode.name, " is given twice"));
      }
    }
    modes.push_back(std::move(mode));
    return absl::OkStatus();
  };
  for (const std::string& name : names) {
    const size_t at = name.find('@');
    const std::string kv_mode = name.substr(0, at);
    WINNOW_ASSIGN_OR_RETURN(const KvMode parsed, ParseKvMode(kv_mode));
    if (at != std::string::npos) {
      float threshold = 0;
      if (!absl::SimpleAtof(name.substr(at + 1), &threshold)) {
        return absl::InvalidArgumentError(
            absl::StrCat("mode ", name, ": \"", name.substr(at + 1), "\" is no threshold"));
      }
      if (!parsed.dms) {
        return absl::InvalidArgumentError(
            absl::StrCat("mode ", name, ": a dense mode has no threshold"));
      }
      WINNOW_RETURN_IF_ERROR(
          add({.name = name, .kv_mode = kv_mode, .dms = true, .threshold = threshold}));
    } else if (!parsed.dms || thresholds.empty()) {
      WINNOW_RETURN_IF_ERROR(add({.name = name, .kv_mode = kv_mode, .dms = parsed.dms}));
    } else {
      for (const float threshold : thresholds) {
        WINNOW_RETURN_IF_ERROR(
            add({.name = thresholds.size() == 1 ? name : absl::StrFormat("%s@%g", name, threshold),
                 .kv_mode = kv_mode,
                 .dms = true,
                 .threshold = threshold}));
      }
    }
  }
  if (modes.empty()) return absl::InvalidArgumentError("no mode given");
  return modes;
}

absl::StatusOr<std::vector<std::string>> BaseAndModes(const std::vector<std::string>& names) {
  std::vector<std::string> modes = {kBaseMode};
  for (const std::string& name : names) {
    WINNOW_RETURN_IF_ERROR(ParseEvalModes({name}, {}).status());
    if (std::find(modes.begin(), modes.end(), name) == modes.end()) modes.push_back(name);
  }
  return modes;
}

}  // namespace winnow::cli
