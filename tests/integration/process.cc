#include "tests/integration/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/check.h"

extern char** environ;

namespace winnow::testing {

Process::Process(const std::string& name, std::vector<std::string> args) {
  const char* temp = std::getenv("TMPDIR");
  error_file_ = absl::StrCat(temp != nullptr ? temp : "/tmp", "/", name, ".XXXXXX");
  const int errors = mkstemp(error_file_.data());
  WINNOW_CHECK(errors >= 0);
  int pipe_ends[2];
  WINNOW_CHECK(pipe2(pipe_ends, O_CLOEXEC) == 0);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], 1);
  posix_spawn_file_actions_adddup2(&actions, errors, 2);
  const std::string path = absl::StrCat(WINNOW_BIN_DIR, "/", name);
  std::vector<char*> argv = {const_cast<char*>(path.c_str())};
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  WINNOW_CHECK(posix_spawn(&pid_, path.c_str(), &actions, nullptr, argv.data(), environ) == 0);
  posix_spawn_file_actions_destroy(&actions);
  close(errors);
  close(pipe_ends[1]);
  out_ = pipe_ends[0];
}

Process::Process(Process&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      out_(std::exchange(other.out_, -1)),
      buffer_(std::move(other.buffer_)),
      error_file_(std::exchange(other.error_file_, {})) {}

Process& Process::operator=(Process&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(out_, other.out_);
  std::swap(buffer_, other.buffer_);
  std::swap(error_file_, other.error_file_);
  return *this;
}

Process::~Process() {
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  if (out_ >= 0) close(out_);
  if (!error_file_.empty()) unlink(error_file_.c_str());
}

std::string Process::WaitReady(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  for (;;) {
    for (size_t end; (end = buffer_.find('\n')) != std::string::npos;) {
      const std::string line = buffer_.substr(0, end);
      buffer_.erase(0, end + 1);
      if (line.rfind("ready ", 0) == 0) return line.substr(6);
    }
    const int64_t left_ms = absl::ToInt64Milliseconds(deadline - absl::Now());
    if (left_ms <= 0) return "";
    pollfd waiting = {.fd = out_, .events = POLLIN, .revents = 0};
    if (poll(&waiting, 1, static_cast<int>(left_ms)) <= 0) return "";
    char bytes[256];
    const ssize_t n = read(out_, bytes, sizeof(bytes));
    if (n <= 0) return "";
    buffer_.append(bytes, static_cast<size_t>(n));
  }
}

void Process::Signal(int signal) const {
  if (pid_ > 0) kill(pid_, signal);
}

std::optional<int> Process::WaitExit(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (pid_ > 0) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      pid_ = -1;
      return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    if (absl::Now() > deadline) return std::nullopt;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return std::nullopt;
}

std::string Process::Errors() const {
  std::ifstream file(error_file_);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace winnow::testing
