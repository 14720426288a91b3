#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/eval/score.h"

namespace winnow::cli {

// The sums of an evaluation that is under way, on disk after every window, so that a run
// that was killed goes on where it was. The file is replaced whole.
class ResumeFile {
 public:
  // `path` "": nothing is kept. `key` says what is evaluated. An existing file is gone on
  // with if its key is the same.
  //   FAILED_PRECONDITION  it is of another evaluation, or damaged; it is left as it is.
  static absl::StatusOr<ResumeFile> Open(const std::string& path, const nlohmann::json& key);

  // The sums of `context`, one for each lane; empty ones if none were saved.
  std::vector<Score> Scores(int context, size_t num_lanes) const;
  // UNAVAILABLE: the file cannot be written.
  absl::Status Save(int context, const std::vector<Score>& scores);

 private:
  explicit ResumeFile(std::string path) : path_(std::move(path)) {}

  std::string path_;
  nlohmann::json key_;
  std::map<std::string, std::vector<Score>> contexts_;
};

}  // namespace winnow::cli
