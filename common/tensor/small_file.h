#pragma once

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"

namespace winnow {

// All of a small regular file. NOT_FOUND if there is none, INVALID_ARGUMENT if it is
// larger than `max_bytes` or no regular file, UNAVAILABLE if it cannot be read.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, size_t max_bytes);

}  // namespace winnow
