#include "cli/eval/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_format.h"

namespace winnow::cli {

Progress::Progress(bool enabled, std::string unit, int64_t total)
    : enabled_(enabled),
      terminal_(enabled && isatty(STDERR_FILENO)),
      unit_(std::move(unit)),
      total_(std::max<int64_t>(total, 1)) {}

Progress::~Progress() {
  if (terminal_) std::fputs("\r\033[K", stderr);
}

void Progress::Skip(int64_t done) {
  done_ += done;
  skipped_ += done;
}

void Progress::Advance(int64_t done) {
  done_ += done;
  if (terminal_) Show();
}

void Progress::Line(const std::string& text) {
  if (!enabled_) return;
  std::fprintf(stderr, "%s%s\n", terminal_ ? "\r\033[K" : "", text.c_str());
  shown_ = absl::InfinitePast();
}

void Progress::Show() {
  const absl::Time now = absl::Now();
  if (now - shown_ < absl::Milliseconds(100)) return;
  shown_ = now;
  const double seconds = std::max(absl::ToDoubleSeconds(now - start_), 1e-3);
  const double rate = static_cast<double>(done_ - skipped_) / seconds;
  const int64_t left =
      rate > 0 ? static_cast<int64_t>(static_cast<double>(total_ - done_) / rate) : 0;
  const int filled = static_cast<int>(30 * done_ / total_);
  std::fprintf(stderr, "\r\033[K[%s%s] %3d %%  %.0f %s/s  %d:%02d left",
               std::string(static_cast<size_t>(filled), '#').c_str(),
               std::string(static_cast<size_t>(std::max(30 - filled, 0)), ' ').c_str(),
               static_cast<int>(100 * done_ / total_), rate, unit_.c_str(),
               static_cast<int>(left / 60), static_cast<int>(left % 60));
}

}  // namespace winnow::cli
