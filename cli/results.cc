#include "cli/results.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/rpc/grpc_status.h"

namespace winnow::cli {
namespace {

const char* FinishName(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return "stop";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    default:
      return "";
  }
}

std::string ShowBytes(uint64_t bytes) {
  if (bytes < 1024 * 1024) {
    return absl::StrFormat("%.1f KiB", static_cast<double>(bytes) / 1024.0);
  }
  return absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / (1024.0 * 1024.0));
}

}  // namespace

void Result::Add(const v1::GenerateResponse& response, absl::Duration since_start) {
  prompt_ids.insert(prompt_ids.end(), response.prompt_token_ids().begin(),
                    response.prompt_token_ids().end());
  if (response.token_ids_size() > 0) {
    if (token_ids.empty()) time_to_first_token = since_start;
    decode_time = since_start - time_to_first_token;
  }
  token_ids.insert(token_ids.end(), response.token_ids().begin(), response.token_ids().end());
  text += response.text();
  if (response.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
    finish_reason = response.finish_reason();
    if (response.has_kv()) kv = response.kv();
  }
}

std::string JsonLine(const Result& result) {
  nlohmann::ordered_json json;
  json["prompt_ids"] = result.prompt_ids;
  json["token_ids"] = result.token_ids;
  json["text"] = result.text;
  json["finish_reason"] = FinishName(result.finish_reason);
  json["kv_bytes"] = nullptr;
  if (result.kv.has_value()) json["kv_bytes"] = result.kv->peak_bytes();
  if (!result.status.ok()) {
    json["error"] = std::string(CodeName(result.status.code()));
    json["message"] = std::string(result.status.message());
  }
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::string StatsTable(const std::vector<Result>& results, absl::Duration wall_time) {
  std::vector<double> first_ms;
  size_t tokens = 0;
  size_t decoded = 0;
  absl::Duration decode_time;
  uint64_t held = 0;
  uint64_t dense = 0;
  uint64_t moved = 0;
  for (const Result& r : results) {
    if (!r.status.ok() || r.token_ids.empty()) continue;
    first_ms.push_back(absl::ToDoubleMilliseconds(r.time_to_first_token));
    tokens += r.token_ids.size();
    decoded += r.token_ids.size() - 1;
    decode_time += r.decode_time;
    if (!r.kv.has_value()) continue;
    held += r.kv->peak_bytes();
    dense += r.kv->dense_bf16_bytes();
    moved += r.kv->transferred_bytes();
  }
  if (first_ms.empty()) return "";
  std::sort(first_ms.begin(), first_ms.end());
  const bool many = first_ms.size() > 1;
  const double decode_seconds = absl::ToDoubleSeconds(decode_time);
  std::string out;
  if (many) absl::StrAppendFormat(&out, "requests             %d\n", first_ms.size());
  absl::StrAppendFormat(&out, "time to first token  %.0f ms%s\n", first_ms[first_ms.size() / 2],
                        many ? " (median)" : "");
  absl::StrAppendFormat(&out, "decode               %.1f tokens/s%s (%d tokens)\n",
                        decode_seconds > 0 ? static_cast<double>(decoded) / decode_seconds : 0.0,
                        many ? " a request" : "", tokens);
  if (many) {
    absl::StrAppendFormat(&out, "all together         %.1f tokens/s\n",
                          static_cast<double>(tokens) / absl::ToDoubleSeconds(wall_time));
  }
  if (dense > 0) {
    absl::StrAppendFormat(
        &out, "KV held              %s (dense BF16: %s, %.2fx)\n", ShowBytes(held),
        ShowBytes(dense),
        static_cast<double>(dense) / static_cast<double>(std::max<uint64_t>(held, 1)));
  } else {
    out += "KV held              not reported\n";
  }
  absl::StrAppendFormat(&out, "KV transferred       %s\n", ShowBytes(moved));
  return out;
}

}  // namespace winnow::cli
