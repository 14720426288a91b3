#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "kernels/kv_format.h"

namespace winnow {

// --kv-mode: "dms-fp8", "dms-bf16", "dense-fp8" or "dense-bf16".
struct KvMode {
  bool dms = false;  // evict by the model's decisions; false: keep all
  kernels::KvFormatId format = kernels::KvFormatId::kFp8;
};

// INVALID_ARGUMENT for any other name.
absl::StatusOr<KvMode> ParseKvMode(std::string_view name);
std::string KvModeName(const KvMode& mode);

}  // namespace winnow
