#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/kv_format.h"

namespace winnow {

// --kv-mode: "dense-" or "dms-" and a format, "dms-fp8".
struct KvMode {
  bool dms = false;  // evict by the model's decisions; false: keep all
  kernels::KvFormatId format = kernels::KvFormatId::kFp8;
};

// `format`, if it is not empty, takes the place of the one in `name`: --kv-format.
// INVALID_ARGUMENT for a name that is in no list below.
absl::StatusOr<KvMode> ParseKvMode(std::string_view name, std::string_view format = "");
// Never says "best" but what that stands for.
std::string KvModeName(const KvMode& mode);

// All names of modes and of formats, for flags' help; "best" among them.
std::vector<std::string> KvModeNames();
std::vector<std::string> KvFormatNames();

}  // namespace winnow
