#include "cli/niah/task.h"

#include <istream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace winnow::cli {
namespace {

using Json = nlohmann::ordered_json;

absl::Status Bad(const std::string& field, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("\"", field, "\" ", what));
}

absl::StatusOr<std::string> String(const Json& json, const char* field) {
  if (!json.contains(field) || !json[field].is_string()) return Bad(field, "is not a string");
  return json[field].get<std::string>();
}

absl::StatusOr<int> Positive(const Json& json, const char* field) {
  if (!json.contains(field) || !json[field].is_number_unsigned() ||
      json[field].get<uint64_t>() < 1 || json[field].get<uint64_t>() > (1u << 30)) {
    return Bad(field, "is not a number in [1, 1073741824]");
  }
  return json[field].get<int>();
}

absl::StatusOr<NiahTask> ParseTask(const std::string& line) {
  const Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError("is not a JSON object");
  NiahTask task;
  WINNOW_ASSIGN_OR_RETURN(task.id, String(json, "id"));
  WINNOW_ASSIGN_OR_RETURN(task.kind, String(json, "kind"));
  WINNOW_ASSIGN_OR_RETURN(task.context, Positive(json, "context"));
  WINNOW_ASSIGN_OR_RETURN(task.max_new_tokens, Positive(json, "max_new_tokens"));
  if (!json.contains("depth") || !json["depth"].is_number() || !(json["depth"] >= 0.0) ||
      !(json["depth"] <= 1.0)) {
    return Bad("depth", "is not a number in [0, 1]");
  }
  task.depth = json["depth"].get<double>();
  if (!json.contains("prompt_ids") || !json["prompt_ids"].is_array() ||
      json["prompt_ids"].empty()) {
    return Bad("prompt_ids", "is not a list of at least one id");
  }
  for (const Json& id : json["prompt_ids"]) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > std::numeric_limits<int32_t>::max()) {
      return Bad("prompt_ids", "holds something that is no token id");
    }
    task.prompt_ids.push_back(id.get<int32_t>());
  }
  if (!json.contains("answers") || !json["answers"].is_array() || json["answers"].empty()) {
    return Bad("answers", "is not a list of at least one string");
  }
  for (const Json& answer : json["answers"]) {
    if (!answer.is_string() || answer.get<std::string>().empty()) {
      return Bad("answers", "holds something that is no text");
    }
    task.answers.push_back(answer.get<std::string>());
  }
  return task;
}

}  // namespace

bool Found(const NiahTask& task, std::string_view output) {
  const std::string lower = absl::AsciiStrToLower(std::string(output));
  for (const std::string& answer : task.answers) {
    if (!absl::StrContains(lower, absl::AsciiStrToLower(answer))) return false;
  }
  return true;
}

std::string TaskLine(const NiahTask& task) {
  const Json json = {{"id", task.id},
                     {"kind", task.kind},
                     {"context", task.context},
                     {"depth", task.depth},
                     {"answers", task.answers},
                     {"max_new_tokens", task.max_new_tokens},
                     {"prompt_ids", task.prompt_ids}};
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

absl::StatusOr<std::vector<NiahTask>> ReadTasks(std::istream& in, const std::string& name) {
  std::vector<NiahTask> tasks;
  std::set<std::string> ids;
  std::string text;
  for (int line = 1; std::getline(in, text); ++line) {
    if (text.find_first_not_of(" \t\r") == text.npos) continue;
    absl::StatusOr<NiahTask> task = ParseTask(text);
    if (!task.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ":", line, ": ", std::string(task.status().message())));
    }
    if (!ids.insert(task->id).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ":", line, ": \"id\" ", task->id, " stands in the file twice"));
    }
    tasks.push_back(*std::move(task));
  }
  if (tasks.empty()) return absl::InvalidArgumentError(absl::StrCat(name, " holds no task"));
  return tasks;
}

}  // namespace winnow::cli
