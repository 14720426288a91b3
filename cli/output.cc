#include "cli/output.h"

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/rpc/grpc_status.h"

namespace winnow::cli {

int PrintError(const absl::Status& status) {
  std::fprintf(stderr, "winnow: %s: %s\n", std::string(CodeName(status.code())).c_str(),
               std::string(status.message()).c_str());
  return 1;
}

absl::Status WriteFile(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".part";
  std::ofstream out(temporary, std::ios::trunc);
  out << text;
  out.close();
  if (!out || std::rename(temporary.c_str(), path.c_str()) != 0) {
    std::remove(temporary.c_str());
    return absl::UnavailableError(absl::StrCat("cannot write ", path));
  }
  return absl::OkStatus();
}

int WriteJson(const std::string& path, const nlohmann::ordered_json& json) {
  if (path.empty()) return 0;
  const absl::Status status = WriteFile(
      path, json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
  return status.ok() ? 0 : PrintError(status);
}

}  // namespace winnow::cli
