#include "cli/niah/log.h"

#include <filesystem>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status_macros.h"

namespace winnow::cli {
namespace {

using Json = nlohmann::ordered_json;

// FNV-1a of all that defines the task.
std::string TaskDigest(const NiahTask& task) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : TaskLine(task)) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  }
  return absl::StrFormat("%016x", hash);
}

constexpr absl::string_view kLineStart = R"({"id":)";  // of every line

absl::Status NotALine(const std::string& path, int line) {
  return absl::InvalidArgumentError(
      absl::StrCat("--resume ", path, ":", line, ": is no result of a needle test"));
}

// Reads a field if it has the target's type.
template <typename T>
bool Get(const Json& json, const char* field, T* target) {
  const auto it = json.find(field);
  if (it == json.end()) return false;
  if constexpr (std::is_same_v<T, std::string>) {
    if (!it->is_string()) return false;
  } else if constexpr (std::is_same_v<T, bool>) {
    if (!it->is_boolean()) return false;
  } else if constexpr (std::is_same_v<T, double>) {
    if (!it->is_number()) return false;
  } else {
    if (!it->is_number_unsigned()) return false;
  }
  *target = it->template get<T>();
  return true;
}

}  // namespace

absl::StatusOr<std::unique_ptr<NiahLog>> NiahLog::Open(const std::string& path) {
  std::unique_ptr<NiahLog> log(new NiahLog(path));
  if (path.empty()) return log;
  uintmax_t whole = 0;  // bytes of whole lines
  if (std::ifstream in(path, std::ios::binary); in) {
    std::string text;
    int line = 1;
    for (; std::getline(in, text) && !in.eof(); ++line) {
      WINNOW_RETURN_IF_ERROR(log->ReadLine(text, line));
      whole += text.size() + 1;
    }
    // Only what Append() may have begun is cut off.
    if (!absl::StartsWith(text, kLineStart) && !absl::StartsWith(kLineStart, text)) {
      return NotALine(path, line);
    }
  }
  std::error_code error;
  if (std::filesystem::exists(path, error)) std::filesystem::resize_file(path, whole, error);
  log->out_.open(path, std::ios::binary | std::ios::app);
  if (error || !log->out_) {
    return absl::UnavailableError(absl::StrCat("--resume ", path, " cannot be written"));
  }
  return log;
}

absl::Status NiahLog::ReadLine(const std::string& text, int line) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  std::string id, mode;
  Entry entry;
  NiahResult& r = entry.result;
  if (!json.is_object() || !Get(json, "id", &id) || !Get(json, "mode", &mode) ||
      !Get(json, "task", &entry.task) || !Get(json, "weights", &entry.weights) ||
      !Get(json, "found", &r.found) || !Get(json, "text", &r.text) ||
      !Get(json, "prompt_tokens", &r.prompt_tokens) || !Get(json, "new_tokens", &r.new_tokens) ||
      !Get(json, "ttft_s", &r.ttft_s) || !Get(json, "total_s", &r.total_s) ||
      !Get(json, "live_tokens", &r.live_tokens) ||
      !Get(json, "logical_tokens", &r.logical_tokens) || !Get(json, "kv_bytes", &r.kv_bytes) ||
      !Get(json, "kv_bytes_dense_bf16", &r.kv_bytes_dense_bf16)) {
    return NotALine(path_, line);
  }
  entries_[{mode, id}] = std::move(entry);
  return absl::OkStatus();
}

absl::StatusOr<const NiahResult*> NiahLog::Find(const NiahTask& task, const std::string& mode,
                                                const std::string& weights) const {
  const auto it = entries_.find({mode, task.id});
  if (it == entries_.end()) return nullptr;
  const Entry& entry = it->second;
  if (entry.task != TaskDigest(task)) {
    return absl::FailedPreconditionError(absl::StrCat("--resume ", path_, ": task ", task.id,
                                                      " was another one (", entry.task, " and not ",
                                                      TaskDigest(task), ")"));
  }
  if (entry.weights != weights) {
    return absl::FailedPreconditionError(absl::StrCat("--resume ", path_, ": mode ", mode,
                                                      " had other weights (", entry.weights,
                                                      " and not ", weights, ")"));
  }
  return &entry.result;
}

absl::Status NiahLog::Append(const NiahTask& task, const std::string& mode,
                             const std::string& weights, const NiahResult& result) {
  if (path_.empty()) return absl::OkStatus();
  Json json = {{"id", task.id}, {"mode", mode}, {"task", TaskDigest(task)}, {"weights", weights}};
  json.update(ResultJson(result));
  out_ << json.dump(-1, ' ', false, Json::error_handler_t::replace) << '\n' << std::flush;
  if (out_) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("--resume ", path_, " cannot be written"));
}

}  // namespace winnow::cli
