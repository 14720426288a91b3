#pragma once

#include <string_view>

#include "absl/strings/str_cat.h"

namespace winnow {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// Lines below `level` are dropped. Default kInfo. Thread-safe.
void SetLogLevel(LogLevel level);
// The word that every line carries as role=..., e.g. "router". Set once, in main().
void SetLogRole(std::string_view role);

// Writes one line to standard error: time, level, role, event and the fields,
//   2026-01-31T10:00:00.123Z INFO role=decode event=admitted transfer_id=4f.. bytes=8320
// `fields` is text of the form "key=value key=value"; LogField() quotes a value
// that needs it. Thread-safe; a line is written whole.
void LogLine(LogLevel level, std::string_view event, std::string_view fields = "");

// " key=value", the value in double quotes if it holds anything but [A-Za-z0-9_.:/+-].
std::string LogField(std::string_view key, const absl::AlphaNum& value);

}  // namespace winnow
