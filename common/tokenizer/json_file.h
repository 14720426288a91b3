#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace winnow {

// JSON read with statuses, never exceptions. `path` is how messages name the object
// that holds a field. A field that is null counts as absent.

// The file parsed, or nullopt if there is no such file. INVALID_ARGUMENT, naming file
// and place, if it is not JSON or larger than 512 MiB; UNAVAILABLE if it cannot be read.
absl::StatusOr<std::optional<nlohmann::json>> ReadJsonFile(const std::string& file);

// The whole of `file`, or nullopt if there is no such file; statuses as above.
absl::StatusOr<std::optional<std::string>> ReadTextFile(const std::string& file);

// The field of `object`, or null if `object` is no object or has no such field.
const nlohmann::json* Find(const nlohmann::json& object, const std::string& name);

// A field of a given type; INVALID_ARGUMENT if it has another type.
absl::StatusOr<bool> BoolOr(const nlohmann::json& object, const std::string& path,
                            const std::string& name, bool fallback);
absl::StatusOr<std::string> StringOr(const nlohmann::json& object, const std::string& path,
                                     const std::string& name, const std::string& fallback);
// And INVALID_ARGUMENT if it is absent.
absl::StatusOr<const nlohmann::json*> RequiredObject(const nlohmann::json& object,
                                                     const std::string& path,
                                                     const std::string& name);

// `value` as an integer in [low, high]; INVALID_ARGUMENT, naming `path`, if it is not.
absl::StatusOr<int64_t> AsInteger(const nlohmann::json& value, const std::string& path, int64_t low,
                                  int64_t high);

// `text` in quotes, control characters escaped, cut short if long.
std::string Quote(const std::string& text);

// `status` with the file's name in front of its message.
absl::Status InFile(const std::string& file, const absl::Status& status);

}  // namespace winnow
