#include "common/kv/kv_mode.h"

#include "absl/strings/str_cat.h"

namespace winnow {

absl::StatusOr<KvMode> ParseKvMode(std::string_view name) {
  for (const bool dms : {false, true}) {
    for (const kernels::KvFormatId format :
         {kernels::KvFormatId::kBf16, kernels::KvFormatId::kFp8}) {
      const KvMode mode{.dms = dms, .format = format};
      if (KvModeName(mode) == name) return mode;
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "kv mode \"", std::string(name), "\" is none of dms-fp8, dms-bf16, dense-fp8, dense-bf16"));
}

std::string KvModeName(const KvMode& mode) {
  return std::string(mode.dms ? "dms-" : "dense-") + std::string(KvFormatName(mode.format));
}

}  // namespace winnow
