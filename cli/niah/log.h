#pragma once

#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "cli/niah/score.h"
#include "cli/niah/task.h"

namespace winnow::cli {

// The results of a run that may be killed: a file with one line of JSON a (task, mode),
// written as soon as it is known. Not thread-safe.
class NiahLog {
 public:
  // Reads what `path` holds and goes on behind it; a line that a killed run left
  // unfinished is cut off. "": nothing is read or kept.
  //   INVALID_ARGUMENT  a line that no such run wrote, by number; the file is left alone.
  //   UNAVAILABLE       the file cannot be written.
  static absl::StatusOr<std::unique_ptr<NiahLog>> Open(const std::string& path);

  // The result of `task` in `mode` if it is there, else null.
  //   FAILED_PRECONDITION  it is there, but of another task with this id or of other
  //                        weights or settings (NiahRunner::Describe()).
  absl::StatusOr<const NiahResult*> Find(const NiahTask& task, const std::string& mode,
                                         const std::string& weights) const;

  absl::Status Append(const NiahTask& task, const std::string& mode, const std::string& weights,
                      const NiahResult& result);

 private:
  struct Entry {
    std::string task, weights;  // a digest; NiahRunner::Describe()
    NiahResult result;
  };

  explicit NiahLog(std::string path) : path_(std::move(path)) {}
  absl::Status ReadLine(const std::string& text, int line);

  const std::string path_;
  std::map<std::pair<std::string, std::string>, Entry> entries_;  // by (mode, task id)
  std::ofstream out_;
};

}  // namespace winnow::cli
