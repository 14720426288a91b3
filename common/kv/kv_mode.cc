#include "common/kv/kv_mode.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status_macros.h"

namespace winnow {
namespace {

constexpr std::string_view kDense = "dense-", kDms = "dms-";

}  // namespace

absl::StatusOr<KvMode> ParseKvMode(std::string_view name, std::string_view format) {
  for (const std::string_view prefix : {kDense, kDms}) {
    if (name.substr(0, prefix.size()) != prefix) continue;
    const auto own = kernels::ParseKvFormat(name.substr(prefix.size()));
    if (!own.ok()) break;
    KvMode mode{.dms = prefix == kDms, .format = *own};
    if (!format.empty()) {
      WINNOW_ASSIGN_OR_RETURN(mode.format, kernels::ParseKvFormat(format));
    }
    return mode;
  }
  return absl::InvalidArgumentError(absl::StrCat("kv mode \"", std::string(name), "\" is none of ",
                                                 absl::StrJoin(KvModeNames(), ", ")));
}

std::string KvModeName(const KvMode& mode) {
  return std::string(mode.dms ? kDms : kDense) + std::string(KvFormatName(mode.format));
}

std::vector<std::string> KvModeNames() {
  std::vector<std::string> names;
  for (const std::string_view prefix : {kDense, kDms}) {
    for (const std::string& format : KvFormatNames()) names.push_back(std::string(prefix) + format);
  }
  return names;
}

std::vector<std::string> KvFormatNames() {
  std::vector<std::string> names;
  for (const kernels::KvFormat& format : kernels::kKvFormats) names.emplace_back(format.name);
  names.emplace_back("best");
  return names;
}

}  // namespace winnow
