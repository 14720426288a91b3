#include "common/dms/dms_config.h"

#include <cmath>
#include <fstream>
#include <initializer_list>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status_macros.h"
#include "nlohmann/json.hpp"

namespace winnow {
namespace {

using Json = nlohmann::json;
using kernels::ChannelZeroing;
using kernels::DecisionSource;

// The first of `keys` that is there and not null.
const Json* Find(const Json& json, std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    const auto it = json.find(key);
    if (it != json.end() && !it->is_null()) return &*it;
  }
  return nullptr;
}

absl::Status Bad(const char* field, const Json& value) {
  // Values from a file may be long and may hold invalid UTF-8.
  const std::string text =
      value.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
  return absl::InvalidArgumentError(absl::StrCat(field, "=", text.substr(0, 80)));
}

absl::Status ReadInt(const Json& json, std::initializer_list<const char*> keys, int min, int max,
                     int* out) {
  const Json* value = Find(json, keys);
  if (value == nullptr) return absl::OkStatus();
  if (!value->is_number_integer() || *value < min || *value > max)
    return Bad(*keys.begin(), *value);
  *out = value->get<int>();
  return absl::OkStatus();
}

absl::Status ReadFloat(const Json& json, std::initializer_list<const char*> keys, float* out) {
  const Json* value = Find(json, keys);
  if (value == nullptr) return absl::OkStatus();
  if (!value->is_number()) return Bad(*keys.begin(), *value);
  *out = value->get<float>();
  return std::isfinite(*out) ? absl::OkStatus() : Bad(*keys.begin(), *value);
}

// One of the names, or what `out` held if the key is absent.
template <typename T>
absl::Status ReadName(const Json& json, const char* key,
                      std::initializer_list<std::pair<const char*, T>> names, T* out) {
  const Json* value = Find(json, {key});
  if (value == nullptr) return absl::OkStatus();
  for (const auto& [name, meaning] : names) {
    if (value->is_string() && *value == name) {
      *out = meaning;
      return absl::OkStatus();
    }
  }
  return Bad(key, *value);
}

// A key and its aliases.
constexpr std::initializer_list<const char*> kWindow = {"dms_window_size", "window_size"};
constexpr std::initializer_list<const char*> kScale = {"dms_alpha_scale", "alpha_scale"};
constexpr std::initializer_list<const char*> kOffset = {"dms_initial_alpha_offset",
                                                        "dms_alpha_offset", "alpha_offset"};

absl::StatusOr<std::optional<DmsConfig>> FromJson(const Json& json, bool has_q_norm) {
  if (Find(json, kWindow) == nullptr && Find(json, kScale) == nullptr &&
      Find(json, kOffset) == nullptr && Find(json, {"dms_cr"}) == nullptr) {
    return std::nullopt;
  }
  DmsConfig config;
  config.window = has_q_norm ? 512 : 256;
  config.rule.source =
      has_q_norm ? DecisionSource::kBorrowedAfterQNorm : DecisionSource::kBorrowedBeforeQNorm;
  if (const Json* separate = Find(json, {"dms_separate_alpha"})) {
    if (!separate->is_boolean()) return Bad("dms_separate_alpha", *separate);
    if (separate->get<bool>()) config.rule.source = DecisionSource::kLogits;
  }
  WINNOW_RETURN_IF_ERROR(ReadName<DecisionSource>(json, "dms_logit_source",
                                                  {{"q", DecisionSource::kBorrowedBeforeQNorm},
                                                   {"q_norm", DecisionSource::kBorrowedAfterQNorm},
                                                   {"proj_alpha", DecisionSource::kLogits}},
                                                  &config.rule.source));
  if (config.rule.source == DecisionSource::kBorrowedAfterQNorm && !has_q_norm) {
    return absl::InvalidArgumentError("dms_logit_source=\"q_norm\", but the model has no q-norm");
  }
  switch (config.rule.source) {
    case DecisionSource::kBorrowedBeforeQNorm:
      config.shift = 0;
      config.rule.zeroing = ChannelZeroing::kBeforeRope;
      break;
    case DecisionSource::kBorrowedAfterQNorm:
      config.rule.zeroing = ChannelZeroing::kBeforeAndAfterRope;
      break;
    case DecisionSource::kLogits:
    case DecisionSource::kNone:
      break;
  }
  WINNOW_RETURN_IF_ERROR(ReadName<ChannelZeroing>(json, "dms_zero_channel",
                                                  {{"none", ChannelZeroing::kNone},
                                                   {"before_rope", ChannelZeroing::kBeforeRope},
                                                   {"both", ChannelZeroing::kBeforeAndAfterRope}},
                                                  &config.rule.zeroing));
  WINNOW_RETURN_IF_ERROR(ReadName<bool>(json, "dms_alpha_per", {{"head", false}, {"layer", true}},
                                        &config.rule.per_layer));
  WINNOW_RETURN_IF_ERROR(ReadInt(json, {"dms_decision_shift"}, 0, 1, &config.shift));
  WINNOW_RETURN_IF_ERROR(ReadInt(json, kWindow, 1, 1 << 20, &config.window));
  WINNOW_RETURN_IF_ERROR(ReadFloat(json, kScale, &config.rule.scale));
  WINNOW_RETURN_IF_ERROR(ReadFloat(json, kOffset, &config.rule.offset));
  return config;
}

// The file's text; nullopt if it cannot be opened.
std::optional<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  return std::string(std::istreambuf_iterator<char>(file), {});
}

absl::StatusOr<std::optional<DmsConfig>> ParseFile(const std::string& path, const std::string& text,
                                                   bool has_q_norm) {
  absl::StatusOr<std::optional<DmsConfig>> config = ParseDmsConfig(text, has_q_norm);
  if (config.ok()) return config;
  return absl::Status(config.status().code(), absl::StrCat(path, ": ", config.status().message()));
}

}  // namespace

absl::StatusOr<std::optional<DmsConfig>> ParseDmsConfig(std::string_view text, bool has_q_norm) {
  const Json json = Json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError("not a JSON object");
  absl::StatusOr<std::optional<DmsConfig>> config = FromJson(json, has_q_norm);
  if (!config.ok() || config->has_value()) return config;
  const Json* inner = Find(json, {"config"});
  if (inner == nullptr || !inner->is_object()) return config;
  return FromJson(*inner, has_q_norm);
}

std::string DescribeRule(const kernels::DecisionRule& rule) {
  const char* zeroing = "";
  if (rule.zeroing == kernels::ChannelZeroing::kBeforeRope) zeroing = "/zero_before_rope";
  if (rule.zeroing == kernels::ChannelZeroing::kBeforeAndAfterRope) zeroing = "/zero_both";
  if (rule.source == kernels::DecisionSource::kNone) return zeroing;
  const char* source = "logits";
  if (rule.source == kernels::DecisionSource::kBorrowedAfterQNorm) source = "q_norm";
  if (rule.source == kernels::DecisionSource::kBorrowedBeforeQNorm) source = "q";
  // %.9g tells all floats apart.
  return absl::StrFormat("%s*%.9g-%.9g%s%s", source, rule.scale, rule.offset,
                         rule.per_layer ? "/layer" : "", zeroing);
}

absl::StatusOr<std::optional<DmsConfig>> LoadDmsConfig(const std::string& model_dir,
                                                       const std::string& adapter_dir,
                                                       bool has_q_norm) {
  if (!adapter_dir.empty()) {
    const std::string path = absl::StrCat(adapter_dir, "/dms_metadata.json");
    const std::optional<std::string> text = ReadFile(path);
    if (!text.has_value()) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
    absl::StatusOr<std::optional<DmsConfig>> config = ParseFile(path, *text, has_q_norm);
    if (config.ok() && !config->has_value()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": no DMS key"));
    }
    return config;
  }
  for (const char* name : {"dms_metadata.json", "config.json"}) {
    const std::string path = absl::StrCat(model_dir, "/", name);
    const std::optional<std::string> text = ReadFile(path);
    if (!text.has_value()) continue;
    absl::StatusOr<std::optional<DmsConfig>> config = ParseFile(path, *text, has_q_norm);
    if (!config.ok() || config->has_value()) return config;
  }
  return std::nullopt;
}

}  // namespace winnow
