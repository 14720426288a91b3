#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace winnow::testing {

// A child process with its standard output on a pipe and its standard error in a file.
// Killed, if it still runs, by the destructor.
class Process {
 public:
  // Starts build/<preset>/bin/`name` with `args`.
  Process(const std::string& name, std::vector<std::string> args);
  ~Process();
  Process(Process&& other) noexcept;
  Process& operator=(Process&& other) noexcept;

  // The HOST:PORT of the line "ready HOST:PORT" on its standard output; empty if it
  // ends or `timeout` passes first.
  std::string WaitReady(absl::Duration timeout = absl::Seconds(20));
  void Signal(int signal) const;
  // Its exit code, or 128 + the signal that ended it; nullopt if it still runs after
  // `timeout`.
  std::optional<int> WaitExit(absl::Duration timeout = absl::Seconds(20));
  // What it wrote to standard error so far.
  std::string Errors() const;

 private:
  pid_t pid_ = -1;
  int out_ = -1;
  std::string buffer_;
  std::string error_file_;
};

}  // namespace winnow::testing
