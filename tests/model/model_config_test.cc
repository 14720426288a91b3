#include "common/model/model_config.h"

#include <gtest/gtest.h>

#include "tests/testing/temp_dir.h"

namespace winnow::testing {
namespace {

ModelConfig Load(const std::string& config, const std::string& generation = "") {
  const TempDir dir;
  dir.Write("config.json", config);
  if (!generation.empty()) dir.Write("generation_config.json", generation);
  const absl::StatusOr<ModelConfig> loaded = LoadModelConfig(dir.path());
  EXPECT_TRUE(loaded.ok()) << loaded.status();
  return loaded.ok() ? *loaded : ModelConfig();
}

// The published config.json of Llama-3.2-1B-Instruct, less what nobody reads.
constexpr const char* kLlama32 = R"({
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false,
  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
  "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
  "max_position_embeddings": 131072, "mlp_bias": false, "num_attention_heads": 32,
  "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": true, "vocab_size": 128256})";

TEST(ModelConfig, Llama32) {
  const ModelConfig config = Load(kLlama32, R"({"do_sample": true, "temperature": 0.6, "top_p": 0.9,
                         "eos_token_id": [128001, 128009]})");
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.num_layers, 16);
  EXPECT_EQ(config.hidden, 2048);
  EXPECT_EQ(config.intermediate, 8192);
  EXPECT_EQ(config.num_heads, 32);
  EXPECT_EQ(config.num_kv_heads, 8);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.vocab_size, 128256);
  EXPECT_EQ(config.max_position_embeddings, 131072);
  EXPECT_FLOAT_EQ(config.rms_norm_eps, 1e-5f);
  EXPECT_FLOAT_EQ(config.rope_theta, 500000.0f);
  EXPECT_FLOAT_EQ(config.rope_scaling.factor, 32.0f);
  EXPECT_FLOAT_EQ(config.rope_scaling.high_freq_factor, 4.0f);
  EXPECT_EQ(config.rope_scaling.original_max_positions, 8192);
  EXPECT_TRUE(config.tie_embeddings);
  EXPECT_FALSE(config.has_q_norm);
  EXPECT_EQ(config.eos_ids, (std::vector<int32_t>{128001, 128009}));  // the generation's
  EXPECT_EQ(config.generation.do_sample, true);
  EXPECT_FLOAT_EQ(config.generation.temperature.value_or(0), 0.6f);
  EXPECT_FLOAT_EQ(config.generation.top_p.value_or(0), 0.9f);
  EXPECT_FALSE(config.generation.top_k.has_value());
}

// Qwen3-8B's, as transformers 5 writes it.
TEST(ModelConfig, Qwen3WithRopeParameters) {
  const ModelConfig config = Load(R"({
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": false,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 12288, "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "sliding_window": null,
    "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936})",
                                  R"({"do_sample": false, "top_k": 20})");
  EXPECT_TRUE(config.has_q_norm);
  EXPECT_EQ(config.q_size(), 4096);
  EXPECT_EQ(config.kv_size(), 1024);
  EXPECT_FLOAT_EQ(config.rope_theta, 1e6f);
  EXPECT_FLOAT_EQ(config.rope_scaling.factor, 1.0f);
  EXPECT_FALSE(config.tie_embeddings);
  EXPECT_EQ(config.eos_ids, std::vector<int32_t>{151645});
  EXPECT_EQ(config.generation.do_sample, false);
  EXPECT_EQ(config.generation.top_k, 20);
}

TEST(ModelConfig, DefaultsOfWhatIsAbsent) {
  const ModelConfig config = Load(R"({
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "max_position_embeddings": 128, "num_attention_heads": 4, "num_hidden_layers": 1,
    "vocab_size": 300})");
  EXPECT_EQ(config.num_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_FLOAT_EQ(config.rope_theta, 10000.0f);
  EXPECT_FLOAT_EQ(config.rms_norm_eps, 1e-6f);
  EXPECT_FALSE(config.tie_embeddings);
  EXPECT_TRUE(config.eos_ids.empty());
  EXPECT_FALSE(config.generation.do_sample.has_value());
  EXPECT_FALSE(config.generation.temperature.has_value());
}

// A vocabulary that is smaller than top_k keeps all.
TEST(ModelConfig, TopKIsAtMostTheVocabulary) {
  const ModelConfig config = Load(kLlama32, R"({"top_k": 2000000000})");
  EXPECT_EQ(config.generation.top_k, 128256);
}

}  // namespace
}  // namespace winnow::testing
