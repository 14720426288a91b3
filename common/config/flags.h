#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace winnow::config {

// "0.1.0", as --version prints it.
std::string_view Version();

struct HostPort {
  std::string host;
  int port = 0;  // [0, 65535]
};

// "127.0.0.1:50051", "[::1]:80", "localhost:0". INVALID_ARGUMENT otherwise.
absl::StatusOr<HostPort> ParseHostPort(std::string_view text);
// "512MiB", "1.5GiB", "4096" (bytes); units B, KiB, MiB, GiB, TiB and kB, MB, GB, TB.
absl::StatusOr<uint64_t> ParseBytes(std::string_view text);
// "1536" or "1.5KiB": the largest unit that shows the number exactly.
std::string FormatBytes(uint64_t bytes);

// The flags of one command: a table of names, targets and what --help says. A flag is
// given as "--name value", "--name=value", or for booleans "--name" and "--no-name"; or
// as the environment variable WINNOW_NAME (capitals, '-' becomes '_'). The command line
// wins over the environment, that over the default, which is what the target holds when
// it is added. Help text says what the flag does, its unit and its trade-off.
//
// Not thread-safe. Targets are not owned and must outlive Parse() and Effective().
class FlagSet {
 public:
  // `usage` is the first line of --help, e.g. "winnow-router --decode-workers LIST".
  FlagSet(std::string usage, std::string summary)
      : usage_(std::move(usage)), summary_(std::move(summary)) {}

  void AddString(std::string name, std::string* target, std::string help);
  void AddBool(std::string name, bool* target, std::string help);
  void AddInt(std::string name, int* target, int min, int max, std::string help);
  // Unset optionals stay unset unless the flag is given.
  void AddOptionalInt(std::string name, std::optional<int>* target, int min, int max,
                      std::string help);
  void AddOptionalUint64(std::string name, std::optional<uint64_t>* target, std::string help);
  void AddOptionalFloat(std::string name, std::optional<float>* target, float min, float max,
                        std::string help);
  void AddBytes(std::string name, uint64_t* target, std::string help);
  void AddDuration(std::string name, absl::Duration* target, std::string help);
  // HOST:PORT, kept as text.
  void AddHostPort(std::string name, std::string* target, std::string help);
  // Comma-separated HOST:PORT; an empty value is an empty list.
  void AddHostPortList(std::string name, std::vector<std::string>* target, std::string help);
  // May be repeated; each use adds one value as it is.
  void AddRepeated(std::string name, std::vector<std::string>* target, std::string help);
  // "off", PORT (then 127.0.0.1:PORT) or HOST:PORT; "off" is stored as "".
  void AddEndpoint(std::string name, std::string* target, std::string help);
  // One of `values`.
  void AddChoice(std::string name, std::string* target, std::vector<std::string> values,
                 std::string help);

  // `args` without the program's name; `getenv` gives a variable's value or nullptr
  // (::getenv in production). --help and --version are known always and end the parse.
  //   INVALID_ARGUMENT  an unknown flag, a missing or bad value, a word that is no flag:
  //                     one sentence that names it.
  absl::Status Parse(absl::Span<const std::string> args,
                     const std::function<const char*(const char*)>& getenv);

  bool help_requested() const { return help_; }
  bool version_requested() const { return version_; }
  // True if the command line or the environment gave this flag.
  bool IsSet(std::string_view name) const;

  std::string Help() const;
  // " name=value name=value ...": the configuration in force, for one log line.
  std::string Effective() const;

 private:
  struct Flag {
    std::string name;
    std::string help;
    std::string default_text;
    bool boolean = false;
    bool set = false;
    std::function<absl::Status(std::string_view)> parse;  // error says only what is wrong
    std::function<std::string()> show;
  };

  void Add(std::string name, std::string help, bool boolean,
           std::function<absl::Status(std::string_view)> parse, std::function<std::string()> show);
  Flag* Find(std::string_view name);

  const std::string usage_;
  const std::string summary_;
  std::vector<Flag> flags_;
  bool help_ = false;
  bool version_ = false;
};

// For main(): parses argv[first..]. Prints help or version to standard output and
// returns 0; prints "PROGRAM: SENTENCE" to standard error and returns 2 on a mistake;
// returns nullopt when the program should go on.
std::optional<int> ParseOrExitCode(FlagSet* flags, std::string_view program, int argc, char** argv,
                                   int first);

}  // namespace winnow::config
