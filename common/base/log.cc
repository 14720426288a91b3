#include "common/base/log.h"

#include <atomic>
#include <cstdio>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace winnow {
namespace {

std::atomic<LogLevel> g_level{LogLevel::kInfo};

std::string& Role() {
  static std::string* role = new std::string("winnow");
  return *role;
}

constexpr const char* kNames[] = {"DEBUG", "INFO", "WARNING", "ERROR"};

}  // namespace

void SetLogLevel(LogLevel level) { g_level.store(level, std::memory_order_relaxed); }
void SetLogRole(std::string_view role) { Role() = std::string(role); }

void LogLine(LogLevel level, std::string_view event, std::string_view fields) {
  if (level < g_level.load(std::memory_order_relaxed)) return;
  const std::string line =
      absl::StrCat(absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone()), " ",
                   kNames[static_cast<int>(level)], " role=", Role(), " event=", std::string(event),
                   fields.empty() || fields.front() == ' ' ? "" : " ", std::string(fields), "\n");
  std::fwrite(line.data(), 1, line.size(), stderr);
}

std::string LogField(std::string_view key, const absl::AlphaNum& value) {
  // absl::string_view is a type of its own in Debian's absl.
  const std::string text(value.Piece().data(), value.Piece().size());
  bool plain = !text.empty();
  for (char c : text) {
    plain = plain && (absl::ascii_isalnum(c) || std::string_view("_.:/+-").find(c) != text.npos);
  }
  if (plain) return absl::StrCat(" ", std::string(key), "=", text);
  return absl::StrCat(" ", std::string(key), "=\"", absl::CEscape(text), "\"");
}

}  // namespace winnow
