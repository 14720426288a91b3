#include "common/model/model_config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tensor/small_file.h"

namespace winnow {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxConfigBytes = size_t{16} << 20;

// Reads fields of one JSON object by name and type; null counts as absent.
class Fields {
 public:
  // `object` must outlive *this.
  Fields(const Json& object, std::string path) : object_(object), path_(std::move(path)) {}

  const Json* Find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  absl::Status Error(const char* name, absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": ", name, " ", what));
  }

  absl::Status Unimplemented(const char* name, const Json& value) const {
    constexpr size_t kMaxShown = 80;
    std::string shown = value.dump(-1, ' ', true, Json::error_handler_t::replace);
    if (shown.size() > kMaxShown) shown = absl::StrCat(shown.substr(0, kMaxShown), "...");
    return absl::UnimplementedError(absl::StrCat(path_, ": ", name, "=", shown));
  }

  absl::Status ReadInt(const char* name, int low, int high, int* out) const {
    const Json* value = Find(name);
    if (value == nullptr) return Error(name, "is missing");
    if (!value->is_number_integer()) return Error(name, "is not an integer");
    // A value past int64 is stored unsigned and would wrap.
    const bool huge =
        value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
    const int64_t number = huge ? INT64_MAX : value->get<int64_t>();
    if (number < low || number > high) {
      return Error(name, absl::StrCat("= ", huge ? "over " : "", number, " is outside [", low, ", ",
                                      high, "]"));
    }
    *out = static_cast<int>(number);
    return absl::OkStatus();
  }

  // Leaves *out as it is if the field is absent. The value must be in (low, high].
  absl::Status ReadFloat(const char* name, double low, double high, float* out) const {
    const Json* value = Find(name);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_number()) return Error(name, "is not a number");
    const double number = static_cast<float>(value->get<double>());
    if (!(number > low && number <= high)) {
      return Error(name, absl::StrCat("= ", number, " is outside (", low, ", ", high, "]"));
    }
    *out = static_cast<float>(number);
    return absl::OkStatus();
  }

  absl::Status ReadBool(const char* name, bool* out) const {
    const Json* value = Find(name);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_boolean()) return Error(name, "is not true or false");
    *out = value->get<bool>();
    return absl::OkStatus();
  }

  absl::Status ReadString(const char* name, std::string* out) const {
    const Json* value = Find(name);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_string()) return Error(name, "is not a string");
    *out = value->get<std::string>();
    return absl::OkStatus();
  }

  const std::string& path() const { return path_; }

 private:
  const Json& object_;
  const std::string path_;
};

absl::StatusOr<Json> ReadObject(const std::string& path) {
  WINNOW_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxConfigBytes));
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object"));
  }
  return json;
}

absl::Status ReadArchitecture(const Fields& fields, ModelConfig* config) {
  const Json* list = fields.Find("architectures");
  if (list == nullptr || !list->is_array() || list->empty() || !(*list)[0].is_string()) {
    return fields.Error("architectures", "is not a list of names");
  }
  config->architecture = (*list)[0].get<std::string>();
  config->has_q_norm = config->architecture == "Qwen3ForCausalLM";
  if (!config->has_q_norm && config->architecture != "LlamaForCausalLM") {
    return fields.Unimplemented("architectures", *list);
  }
  return absl::OkStatus();
}

absl::Status ReadShapes(const Fields& fields, ModelConfig* config) {
  WINNOW_RETURN_IF_ERROR(fields.ReadInt("num_hidden_layers", 1, 1024, &config->num_layers));
  WINNOW_RETURN_IF_ERROR(fields.ReadInt("hidden_size", 1, 1 << 17, &config->hidden));
  WINNOW_RETURN_IF_ERROR(fields.ReadInt("intermediate_size", 1, 1 << 20, &config->intermediate));
  WINNOW_RETURN_IF_ERROR(fields.ReadInt("num_attention_heads", 1, 1024, &config->num_heads));
  WINNOW_RETURN_IF_ERROR(fields.ReadInt("vocab_size", 1, 1 << 21, &config->vocab_size));
  WINNOW_RETURN_IF_ERROR(
      fields.ReadInt("max_position_embeddings", 1, 1 << 20, &config->max_position_embeddings));
  config->num_kv_heads = config->num_heads;
  if (fields.Find("num_key_value_heads") != nullptr) {
    WINNOW_RETURN_IF_ERROR(
        fields.ReadInt("num_key_value_heads", 1, config->num_heads, &config->num_kv_heads));
  }
  if (config->num_heads % config->num_kv_heads != 0) {
    return fields.Error("num_key_value_heads",
                        absl::StrCat("= ", config->num_kv_heads,
                                     " does not divide num_attention_heads=", config->num_heads));
  }
  if (fields.Find("head_dim") != nullptr) {
    WINNOW_RETURN_IF_ERROR(fields.ReadInt("head_dim", 1, 1 << 16, &config->head_dim));
  } else if (config->hidden % config->num_heads == 0) {
    config->head_dim = config->hidden / config->num_heads;
  } else {
    return fields.Error("hidden_size",
                        absl::StrCat("= ", config->hidden,
                                     " is no multiple of num_attention_heads=", config->num_heads));
  }
  return absl::OkStatus();
}

// What the forward pass has no code for.
absl::Status RefuseVariants(const Fields& fields) {
  for (const char* name : {"attention_bias", "mlp_bias", "use_sliding_window"}) {
    bool on = false;
    WINNOW_RETURN_IF_ERROR(fields.ReadBool(name, &on));
    if (on) return fields.Unimplemented(name, true);
  }
  std::string act = "silu";
  WINNOW_RETURN_IF_ERROR(fields.ReadString("hidden_act", &act));
  if (act != "silu") return fields.Unimplemented("hidden_act", act);
  if (const Json* q = fields.Find("quantization_config")) {
    return fields.Unimplemented("quantization_config", *q);
  }
  const Json* window = fields.Find("sliding_window");
  if (window != nullptr && fields.Find("use_sliding_window") == nullptr) {
    return fields.Unimplemented("sliding_window", *window);
  }
  if (const Json* types = fields.Find("layer_types")) {
    for (const Json& type : *types) {
      if (type != "full_attention") return fields.Unimplemented("layer_types", type);
    }
  }
  return absl::OkStatus();
}

// The object that names a rope type: config.json's "rope_scaling", or since
// transformers 5 "rope_parameters", which holds rope_theta too.
absl::Status ReadRopeObject(const Fields& fields, ModelConfig* config) {
  constexpr double kMax = 1e9;
  WINNOW_RETURN_IF_ERROR(fields.ReadFloat("rope_theta", 0, 1e12, &config->rope_theta));
  float partial = 1.0f;
  WINNOW_RETURN_IF_ERROR(fields.ReadFloat("partial_rotary_factor", 0, 1, &partial));
  if (partial != 1.0f) return fields.Unimplemented("partial_rotary_factor", partial);
  std::string type = "default";
  WINNOW_RETURN_IF_ERROR(fields.ReadString("type", &type));  // the older name
  WINNOW_RETURN_IF_ERROR(fields.ReadString("rope_type", &type));
  if (type == "default") return absl::OkStatus();
  if (type != "llama3") return fields.Unimplemented("rope_type", type);
  for (const char* name : {"factor", "low_freq_factor", "high_freq_factor"}) {
    if (fields.Find(name) == nullptr) return fields.Error(name, "is missing");
  }
  kernels::Llama3RopeScaling& scaling = config->rope_scaling;
  WINNOW_RETURN_IF_ERROR(fields.ReadFloat("factor", 0, kMax, &scaling.factor));
  WINNOW_RETURN_IF_ERROR(fields.ReadFloat("low_freq_factor", 0, kMax, &scaling.low_freq_factor));
  WINNOW_RETURN_IF_ERROR(fields.ReadFloat("high_freq_factor", 0, kMax, &scaling.high_freq_factor));
  if (scaling.high_freq_factor <= scaling.low_freq_factor) {
    return fields.Error("high_freq_factor", "is not above low_freq_factor");
  }
  return fields.ReadInt("original_max_position_embeddings", 1, 1 << 20,
                        &scaling.original_max_positions);
}

absl::Status ReadRope(const Fields& fields, ModelConfig* config) {
  WINNOW_RETURN_IF_ERROR(fields.ReadFloat("rope_theta", 0, 1e12, &config->rope_theta));
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    const Json* rope = fields.Find(name);
    if (rope == nullptr) continue;
    if (!rope->is_object()) return fields.Error(name, "is not an object");
    WINNOW_RETURN_IF_ERROR(
        ReadRopeObject(Fields(*rope, absl::StrCat(fields.path(), ": ", name)), config));
  }
  return absl::OkStatus();
}

// An id or a list of ids.
absl::Status ReadEos(const Fields& fields, ModelConfig* config) {
  const Json* eos = fields.Find("eos_token_id");
  if (eos == nullptr) return absl::OkStatus();
  const Json list = eos->is_array() ? *eos : Json::array({*eos});
  std::vector<int32_t> ids;
  for (const Json& id : list) {
    if (!id.is_number_unsigned() ||
        id.get<uint64_t>() >= static_cast<uint64_t>(config->vocab_size)) {
      return fields.Error("eos_token_id",
                          absl::StrCat("is not a list of ids in [0, ", config->vocab_size, ")"));
    }
    ids.push_back(static_cast<int32_t>(id.get<uint64_t>()));
  }
  config->eos_ids = std::move(ids);
  return absl::OkStatus();
}

absl::Status ReadGeneration(const Fields& fields, ModelConfig* config) {
  GenerationDefaults& generation = config->generation;
  if (fields.Find("do_sample") != nullptr) {
    bool do_sample = false;
    WINNOW_RETURN_IF_ERROR(fields.ReadBool("do_sample", &do_sample));
    generation.do_sample = do_sample;
  }
  if (fields.Find("temperature") != nullptr) {
    float temperature = 0.0f;
    // Exclusive of -1e-9: zero is allowed, and means greedy.
    WINNOW_RETURN_IF_ERROR(fields.ReadFloat("temperature", -1e-9, 100, &temperature));
    generation.temperature = std::max(temperature, 0.0f);
  }
  if (fields.Find("top_k") != nullptr) {
    int top_k = 0;
    WINNOW_RETURN_IF_ERROR(fields.ReadInt("top_k", 0, INT32_MAX, &top_k));
    generation.top_k = std::min(top_k, config->vocab_size);
  }
  if (fields.Find("top_p") != nullptr) {
    float top_p = 1.0f;
    WINNOW_RETURN_IF_ERROR(fields.ReadFloat("top_p", 0, 1, &top_p));
    generation.top_p = top_p;
  }
  return ReadEos(fields, config);
}

}  // namespace

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& dir) {
  const std::string path = absl::StrCat(dir, "/config.json");
  WINNOW_ASSIGN_OR_RETURN(const Json json, ReadObject(path));
  const Fields fields(json, path);
  ModelConfig config;
  WINNOW_RETURN_IF_ERROR(ReadArchitecture(fields, &config));
  WINNOW_RETURN_IF_ERROR(ReadShapes(fields, &config));
  WINNOW_RETURN_IF_ERROR(RefuseVariants(fields));
  WINNOW_RETURN_IF_ERROR(ReadRope(fields, &config));
  WINNOW_RETURN_IF_ERROR(fields.ReadFloat("rms_norm_eps", 0, 1, &config.rms_norm_eps));
  WINNOW_RETURN_IF_ERROR(fields.ReadBool("tie_word_embeddings", &config.tie_embeddings));
  WINNOW_RETURN_IF_ERROR(ReadEos(fields, &config));

  const std::string generation_path = absl::StrCat(dir, "/generation_config.json");
  const absl::StatusOr<Json> generation = ReadObject(generation_path);
  if (generation.ok()) {
    WINNOW_RETURN_IF_ERROR(ReadGeneration(Fields(*generation, generation_path), &config));
  } else if (!absl::IsNotFound(generation.status())) {
    return generation.status();
  }
  return config;
}

}  // namespace winnow
