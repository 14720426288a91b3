#include "cli/eval/resume.h"

#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cli/output.h"

namespace winnow::cli {
namespace {

std::string ToText(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

absl::StatusOr<ResumeFile> ResumeFile::Open(const std::string& path, const nlohmann::json& key) {
  ResumeFile file(path);
  // As it reads back: a path need not be UTF-8.
  file.key_ = nlohmann::json::parse(ToText(key));
  std::ifstream in;
  if (!path.empty()) in.open(path);
  if (!in.is_open()) return file;
  bool same = false;
  try {
    const nlohmann::json saved = nlohmann::json::parse(in);
    same = saved.at("key") == file.key_;
    if (same) saved.at("contexts").get_to(file.contexts_);
  } catch (const nlohmann::json::exception&) {
    same = false;
  }
  if (!same) {
    return absl::FailedPreconditionError(absl::StrCat(
        path, " is what another evaluation left, or damaged; finish that one or delete the file"));
  }
  return file;
}

std::vector<Score> ResumeFile::Scores(int context, size_t num_lanes) const {
  const auto it = contexts_.find(absl::StrCat(context));
  if (it == contexts_.end() || it->second.size() != num_lanes) return std::vector<Score>(num_lanes);
  return it->second;
}

absl::Status ResumeFile::Save(int context, const std::vector<Score>& scores) {
  if (path_.empty()) return absl::OkStatus();
  contexts_[absl::StrCat(context)] = scores;
  return WriteFile(path_, ToText({{"key", key_}, {"contexts", contexts_}}));
}

}  // namespace winnow::cli
