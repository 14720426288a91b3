#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "absl/status/status.h"

namespace winnow::cli {

// "winnow: CODE: message" on standard error. Returns the exit code, 1.
int PrintError(const absl::Status& status);

// Replaces the file at `path` by `text`, whole or not at all.
//   UNAVAILABLE  it cannot be written; the message names it.
absl::Status WriteFile(const std::string& path, const std::string& text);

// Writes `json` to `path` ("": nowhere); what is no UTF-8 in it becomes U+FFFD. Returns the exit
// code, having said what failed.
int WriteJson(const std::string& path, const nlohmann::ordered_json& json);

}  // namespace winnow::cli
