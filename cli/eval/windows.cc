#include "cli/eval/windows.h"

#include "absl/strings/str_cat.h"

namespace winnow::cli {

absl::StatusOr<std::vector<EvalWindow>> PlanWindows(int64_t num_tokens, int context, int count,
                                                    Scoring scoring, int stride) {
  if (context < 2) {
    return absl::InvalidArgumentError(absl::StrCat("context=", context, " is below 2"));
  }
  if (count < 1) {
    return absl::InvalidArgumentError(absl::StrCat("windows=", count, " is below 1"));
  }
  if (scoring != Scoring::kStride) stride = context;
  if (stride < 1 || stride > context) {
    return absl::InvalidArgumentError(
        absl::StrCat("stride=", stride, " is outside [1, context=", context, "]"));
  }
  const int64_t needed = int64_t{stride} * (count - 1) + context;
  if (num_tokens < needed) {
    return absl::InvalidArgumentError(absl::StrCat("the text has ", num_tokens, " tokens; ", count,
                                                   " windows of ", context, " need ", needed));
  }
  if (scoring == Scoring::kHalf && context < 3) {
    return absl::InvalidArgumentError(
        absl::StrCat("context=", context, " leaves nothing to score in its second half"));
  }
  std::vector<EvalWindow> windows;
  windows.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    int first = 1;
    if (scoring == Scoring::kHalf) first = context / 2 + 1;
    if (scoring == Scoring::kStride && i > 0) first = context - stride;
    if (first == 0) first = 1;  // windows that do not overlap: nothing precedes token 0
    windows.push_back({.begin = int64_t{stride} * i, .length = context, .first_target = first});
  }
  return windows;
}

}  // namespace winnow::cli
