#include "common/tokenizer/json_file.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace winnow {
namespace {

constexpr uintmax_t kMaxFileBytes = uintmax_t{512} << 20;

std::string Join(const std::string& path, const std::string& name) {
  return path.empty() ? name : absl::StrCat(path, ".", name);
}

}  // namespace

absl::StatusOr<std::optional<std::string>> ReadTextFile(const std::string& file) {
  std::error_code error;
  const auto status = std::filesystem::status(file, error);
  if (status.type() == std::filesystem::file_type::not_found) return std::optional<std::string>();
  if (error || !std::filesystem::is_regular_file(status)) {
    return absl::UnavailableError(
        absl::StrCat("cannot read ", file, ": ", error ? error.message() : "not a file"));
  }
  const uintmax_t size = std::filesystem::file_size(file, error);
  if (!error && size > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, " has ", size, " bytes, more than ", kMaxFileBytes));
  }
  std::string text(error ? 0 : size, '\0');
  std::ifstream in(file, std::ios::binary);
  if (!in.read(text.data(), static_cast<std::streamsize>(text.size()))) {
    return absl::UnavailableError(absl::StrCat("cannot read ", file, ": ", std::strerror(errno)));
  }
  return std::optional<std::string>(std::move(text));
}

absl::StatusOr<std::optional<nlohmann::json>> ReadJsonFile(const std::string& file) {
  WINNOW_ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadTextFile(file));
  if (!text) return std::optional<nlohmann::json>();
  try {
    return std::optional<nlohmann::json>(nlohmann::json::parse(*text));
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, " is not JSON: ", absl::Utf8SafeCHexEscape(e.what())));
  }
}

const nlohmann::json* Find(const nlohmann::json& object, const std::string& name) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(name);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

absl::StatusOr<bool> BoolOr(const nlohmann::json& object, const std::string& path,
                            const std::string& name, bool fallback) {
  const nlohmann::json* value = Find(object, name);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) {
    return absl::InvalidArgumentError(absl::StrCat(Join(path, name), " is not true or false"));
  }
  return value->get<bool>();
}

absl::StatusOr<std::string> StringOr(const nlohmann::json& object, const std::string& path,
                                     const std::string& name, const std::string& fallback) {
  const nlohmann::json* value = Find(object, name);
  if (value == nullptr) return fallback;
  if (!value->is_string()) {
    return absl::InvalidArgumentError(absl::StrCat(Join(path, name), " is not a string"));
  }
  return value->get<std::string>();
}

absl::StatusOr<const nlohmann::json*> RequiredObject(const nlohmann::json& object,
                                                     const std::string& path,
                                                     const std::string& name) {
  const nlohmann::json* value = Find(object, name);
  if (value == nullptr || !value->is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(Join(path, name), " is missing or not an object"));
  }
  return value;
}

absl::StatusOr<int64_t> AsInteger(const nlohmann::json& value, const std::string& path, int64_t low,
                                  int64_t high) {
  // A value past int64_t is unsigned, and negative once converted.
  if (!value.is_number_integer() || value.get<int64_t>() < low || value.get<int64_t>() > high) {
    return absl::InvalidArgumentError(absl::StrCat(path, "=", Quote(value.dump(-1, ' ', true)),
                                                   " is not an integer in [", low, ", ", high,
                                                   "]"));
  }
  return value.get<int64_t>();
}

std::string Quote(const std::string& text) {
  constexpr size_t kMax = 80;
  size_t length = std::min(text.size(), kMax);
  while (length < text.size() && length > 0 && (text[length] & 0xC0) == 0x80) --length;
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(text.substr(0, length)),
                      length < text.size() ? "..." : "", "\"");
}

absl::Status InFile(const std::string& file, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(file, ": ", status.message()));
}

}  // namespace winnow
