#pragma once

#include <cstdint>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace winnow::cli {

// Says on standard error how far a long run is: one line that is rewritten on a terminal,
// elsewhere only what Line() says.
class Progress {
 public:
  // `total` units of work; `unit` names them, "tokens".
  Progress(bool enabled, std::string unit, int64_t total);
  ~Progress();

  // Work that an earlier run did counts as done, but not for the rate.
  void Skip(int64_t done);
  void Advance(int64_t done);
  // A line that stays.
  void Line(const std::string& text);

 private:
  void Show();

  const bool enabled_;
  const bool terminal_;
  const std::string unit_;
  const int64_t total_;
  const absl::Time start_ = absl::Now();
  absl::Time shown_ = absl::InfinitePast();
  int64_t done_ = 0;
  int64_t skipped_ = 0;
};

}  // namespace winnow::cli
