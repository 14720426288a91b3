// Directories that are not quite models: each gives a named status, and nothing aborts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <ostream>

#include "common/model/model.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"

namespace winnow::testing {
namespace {

using Json = nlohmann::json;
using ::testing::HasSubstr;

struct Case {
  const char* name;
  // Spoils a good tiny directory.
  std::function<void(const TempDir&)> spoil;
  absl::StatusCode code;
  const char* message;
};

void PrintTo(const Case& c, std::ostream* os) { *os << c.name; }

std::function<void(const TempDir&)> Remove(const char* file) {
  return [=](const TempDir& dir) { std::filesystem::remove(dir.File(file)); };
}

std::function<void(const TempDir&)> Text(const char* file, const std::string& text) {
  return [=](const TempDir& dir) { dir.Write(file, text); };
}

// Sets a field of config.json (another file's with `file`); null removes it.
std::function<void(const TempDir&)> Set(const char* field, const Json& value,
                                        const char* file = "config.json") {
  return [=](const TempDir& dir) {
    Json json = Json::parse(ReadWholeFile(dir.File(file)));
    json[field] = value;
    if (value.is_null()) json.erase(field);
    dir.Write(file, json.dump());
  };
}

std::function<void(const TempDir&)> Truncate(const char* file, size_t bytes) {
  return
      [=](const TempDir& dir) { dir.Write(file, ReadWholeFile(dir.File(file)).substr(0, bytes)); };
}

// Replaces text in the safetensors header by other text of the same length.
std::function<void(const TempDir&)> Header(const std::string& from, const std::string& to) {
  return [=](const TempDir& dir) {
    std::string file = ReadWholeFile(dir.File("model.safetensors"));
    const size_t at = file.find(from);
    ASSERT_NE(at, std::string::npos);
    ASSERT_EQ(from.size(), to.size());
    file.replace(at, from.size(), to);
    dir.Write("model.safetensors", file);
  };
}

constexpr absl::StatusCode kNotFound = absl::StatusCode::kNotFound;
constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
constexpr absl::StatusCode kUnimplemented = absl::StatusCode::kUnimplemented;

const Case kCases[] = {
    {"NoConfig", Remove("config.json"), kNotFound, "config.json"},
    {"NoWeights", Remove("model.safetensors"), kNotFound, "model.safetensors"},
    {"EmptyConfig", Text("config.json", ""), kInvalid, "config.json: not a JSON object"},
    {"ConfigIsAList", Text("config.json", "[]"), kInvalid, "config.json"},
    {"NanInConfig", Text("config.json", "{\"hidden_size\": NaN}"), kInvalid, "config.json"},
    {"BadGenerationConfig", Text("generation_config.json", "{"), kInvalid,
     "generation_config.json"},
    {"NoArchitecture", Set("architectures", nullptr), kInvalid, "architectures"},
    {"OtherArchitecture", Set("architectures", {"GPT2LMHeadModel"}), kUnimplemented,
     "GPT2LMHeadModel"},
    {"NoLayers", Set("num_hidden_layers", nullptr), kInvalid, "num_hidden_layers is missing"},
    {"ZeroLayers", Set("num_hidden_layers", 0), kInvalid, "num_hidden_layers"},
    {"NegativeLayers", Set("num_hidden_layers", -1), kInvalid, "num_hidden_layers"},
    {"HugeLayers", Set("num_hidden_layers", 2000000000), kInvalid, "num_hidden_layers"},
    {"LayersPastInt64", Set("num_hidden_layers", 18446744073709551615u), kInvalid,
     "num_hidden_layers"},
    {"LayersAsText", Set("num_hidden_layers", "2"), kInvalid, "num_hidden_layers"},
    {"LayersAsFloat", Set("num_hidden_layers", 2.5), kInvalid, "num_hidden_layers"},
    {"OneLayerTooMany", Set("num_hidden_layers", 3), kInvalid, "model.layers.2."},
    {"HiddenDisagrees", Set("hidden_size", 128), kInvalid, "model.embed_tokens.weight"},
    {"HugeVocabulary", Set("vocab_size", 2000000), kInvalid, "model.embed_tokens.weight"},
    {"KvHeadsDoNotDivide", Set("num_key_value_heads", 3), kInvalid, "num_key_value_heads"},
    {"ZeroHeads", Set("num_attention_heads", 0), kInvalid, "num_attention_heads"},
    {"OddHeadDim", Set("head_dim", 17), kUnimplemented, "head_dim"},
    {"HugeHeadDim", Set("head_dim", 4096), kUnimplemented, "head_dim"},
    {"ZeroPositions", Set("max_position_embeddings", 0), kInvalid, "max_position_embeddings"},
    {"HugePositions", Set("max_position_embeddings", 1 << 30), kInvalid, "max_position_embeddings"},
    {"NegativeEps", Set("rms_norm_eps", -1e-5), kInvalid, "rms_norm_eps"},
    {"ZeroTheta", Set("rope_theta", 0), kInvalid, "rope_theta"},
    {"TinyTheta", Set("rope_theta", 1e-300), kInvalid, "rope_theta"},
    {"HugeTheta", Set("rope_theta", 1e300), kInvalid, "rope_theta"},
    {"ThetaAsText", Set("rope_theta", "10000"), kInvalid, "rope_theta"},
    {"Yarn", Set("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}), kUnimplemented, "yarn"},
    {"LinearRopeOldName", Set("rope_scaling", {{"type", "linear"}, {"factor", 4.0}}),
     kUnimplemented, "linear"},
    {"Llama3WithoutFactor", Set("rope_scaling", {{"rope_type", "llama3"}}), kInvalid, "factor"},
    {"RopeScalingAsText", Set("rope_scaling", "llama3"), kInvalid, "rope_scaling"},
    {"AttentionBias", Set("attention_bias", true), kUnimplemented, "attention_bias"},
    {"MlpBias", Set("mlp_bias", true), kUnimplemented, "mlp_bias"},
    {"BiasAsNumber", Set("mlp_bias", 1), kInvalid, "mlp_bias"},
    {"Gelu", Set("hidden_act", "gelu"), kUnimplemented, "gelu"},
    {"SlidingWindow", Set("use_sliding_window", true), kUnimplemented, "use_sliding_window"},
    {"SlidingLayers", Set("layer_types", {"full_attention", "sliding_attention"}), kUnimplemented,
     "sliding_attention"},
    {"Quantized", Set("quantization_config", {{"quant_method", "fp8"}}), kUnimplemented, "fp8"},
    {"EosPastVocabulary", Set("eos_token_id", 259), kInvalid, "eos_token_id"},
    {"EosNegative", Set("eos_token_id", {1, -1}), kInvalid, "eos_token_id"},
    {"TopPAboveOne", Set("top_p", 1.5, "generation_config.json"), kInvalid, "top_p"},
    {"NegativeTemperature", Set("temperature", -1, "generation_config.json"), kInvalid,
     "temperature"},
    {"WindowZero", Set("dms_window_size", 0), kInvalid, "dms_window_size"},
    {"WeightsTruncated", Truncate("model.safetensors", 20000), kInvalid, "model.safetensors"},
    {"WeightsEmpty", Truncate("model.safetensors", 0), kInvalid, "model.safetensors"},
    {"HeaderLengthAbsurd", Text("model.safetensors", std::string(64, '\xff')), kInvalid,
     "18446744073709551615"},
    {"PickleAlone",
     [](const TempDir& dir) {
       std::filesystem::rename(dir.File("model.safetensors"), dir.File("pytorch_model.bin"));
     },
     kNotFound, "model.safetensors"},
    {"TensorMissing", Header("model.norm.weight", "model.norm.xxxxxx"), kInvalid,
     "model.norm.weight"},
    {"TensorOfIntegers", Header("\"BF16\"", "\"I16\" "), kUnimplemented, "I16"},
    {"TensorMisshapen", Header("[259,64]", "[64,259]"), kInvalid, "model.embed_tokens.weight"},
    {"NotTied", Set("tie_word_embeddings", false), kInvalid, "lm_head.weight"},
};

class BadModel : public ::testing::TestWithParam<Case> {};

TEST_P(BadModel, GivesANamedStatus) {
  const TempDir dir;
  WriteTinyModel(dir.path());
  GetParam().spoil(dir);
  const absl::Status status = Model::Load(dir.path(), "").status();
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(Cases, BadModel, ::testing::ValuesIn(kCases),
                         [](const auto& c) { return c.param.name; });

TEST(Model, NoDirectory) {
  const absl::Status status = Model::Load("/nonexistent/model", "").status();
  EXPECT_EQ(status.code(), kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nonexistent/model"));
}

struct AdapterCase {
  const char* name;
  std::function<void(const TempDir&)> spoil;
  absl::StatusCode code;
  const char* message;
};

void PrintTo(const AdapterCase& c, std::ostream* os) { *os << c.name; }

// An adapter written for a model with this difference.
std::function<void(const TempDir&)> For(const TinyModelOptions& model, int lora_rank = 0) {
  return [=](const TempDir& dir) { WriteTinyAdapter(dir.path(), model, {.lora_rank = lora_rank}); };
}

constexpr absl::StatusCode kPrecondition = absl::StatusCode::kFailedPrecondition;

const AdapterCase kAdapterCases[] = {
    {"NoMetadata", Remove("dms_metadata.json"), kNotFound, "dms_metadata.json"},
    {"NoTensors", Remove("dms_adapter.safetensors"), kNotFound, "no safetensors file"},
    {"TwoFiles", Text("more.safetensors", ""), kInvalid, "more.safetensors"},
    {"TensorsTruncated", Truncate("dms_adapter.safetensors", 1000), kInvalid,
     "dms_adapter.safetensors"},
    {"MetadataNotJson", Text("dms_metadata.json", "{"), kInvalid, "dms_metadata.json"},
    {"WindowZero", Set("dms_window_size", 0, "dms_metadata.json"), kInvalid, "dms_window_size"},
    {"WindowHuge", Set("dms_window_size", 4294967296, "dms_metadata.json"), kInvalid,
     "dms_window_size"},
    {"ShiftTwo", Set("dms_decision_shift", 2, "dms_metadata.json"), kInvalid, "dms_decision_shift"},
    {"FewerLayers", For({.num_layers = 1}), kPrecondition, "model.layers.1."},
    {"MoreLayers", For({.num_layers = 3}), kPrecondition, "model.layers.2."},
    {"OtherHidden", For({.hidden = 32}), kPrecondition, "dms_proj_alpha"},
    {"OtherHeads", For({.num_kv_heads = 4}), kPrecondition, "dms_proj_alpha.weight"},
    {"LoraOfOtherShape", For({.head_dim = 32}, 2), kPrecondition, "lora_"},
    {"LoraWithoutScale",
     [](const TempDir& dir) {
       WriteTinyAdapter(dir.path(), {}, {.lora_rank = 2});
       Set("lora_alpha", nullptr, "dms_metadata.json")(dir);
     },
     kInvalid, "lora_alpha"},
    {"BorrowedRuleWithProjections", Set("dms_separate_alpha", false, "dms_metadata.json"),
     kPrecondition, "of no use"},
};

class BadAdapter : public ::testing::TestWithParam<AdapterCase> {};

TEST_P(BadAdapter, GivesANamedStatus) {
  const TempDir model, adapter;
  WriteTinyModel(model.path());
  WriteTinyAdapter(adapter.path());
  ASSERT_TRUE(Model::Load(model.path(), adapter.path()).ok());
  GetParam().spoil(adapter);
  const absl::Status status = Model::Load(model.path(), adapter.path()).status();
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(Cases, BadAdapter, ::testing::ValuesIn(kAdapterCases),
                         [](const auto& c) { return c.param.name; });

TEST(Model, DigestFollowsEveryTensorAndTheAdapter) {
  const TempDir a, b, c, adapter;
  WriteTinyModel(a.path());
  WriteTinyModel(b.path());
  WriteTinyModel(c.path(), {.seed = 2});
  WriteTinyAdapter(adapter.path());
  const auto digest = [](const TempDir& dir, const std::string& adapter_dir) {
    const auto model = Model::Load(dir.path(), adapter_dir);
    EXPECT_TRUE(model.ok()) << model.status();
    return (*model)->digest();
  };
  EXPECT_EQ(digest(a, ""), digest(b, ""));
  EXPECT_NE(digest(a, ""), digest(c, ""));
  EXPECT_NE(digest(a, ""), digest(a, adapter.path()));
}

// The tensors are the same, the merged weights are not.
TEST(Model, DigestFollowsTheScaleOfTheLowRankUpdate) {
  const TempDir model, adapter;
  WriteTinyModel(model.path());
  WriteTinyAdapter(adapter.path(), {}, {.lora_rank = 2});
  const auto before = Model::Load(model.path(), adapter.path());
  ASSERT_TRUE(before.ok()) << before.status();
  std::ifstream in(adapter.File("dms_metadata.json"));
  nlohmann::json metadata = nlohmann::json::parse(in);
  ASSERT_TRUE(metadata.contains("lora_alpha"));
  metadata["lora_alpha"] = 2 * metadata["lora_alpha"].get<double>();
  adapter.Write("dms_metadata.json", metadata.dump());
  const auto after = Model::Load(model.path(), adapter.path());
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_NE((*before)->digest(), (*after)->digest());
}

}  // namespace
}  // namespace winnow::testing
