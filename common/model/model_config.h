#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/rope.h"

namespace winnow {

// What generation_config.json says; unset: it does not.
struct GenerationDefaults {
  std::optional<bool> do_sample;  // false: greedy, whatever the rest says
  std::optional<float> temperature;
  std::optional<int> top_k;
  std::optional<float> top_p;
};

// The hyper-parameters of a decoder, from config.json and generation_config.json.
struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM" or "Qwen3ForCausalLM"
  int num_layers = 0;
  int hidden = 0;
  int intermediate = 0;
  int num_heads = 0;
  int num_kv_heads = 0;  // divides num_heads
  int head_dim = 0;      // even
  int vocab_size = 0;
  int max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  float rope_theta = 10000.0f;
  kernels::Llama3RopeScaling rope_scaling;
  bool has_q_norm = false;       // RMS norm of each q and k head (Qwen3)
  bool tie_embeddings = false;   // lm_head is the embedding
  std::vector<int32_t> eos_ids;  // generation_config.json's, else config.json's
  GenerationDefaults generation;

  int q_size() const { return num_heads * head_dim; }
  int kv_size() const { return num_kv_heads * head_dim; }
};

// Reads dir/config.json and, if it is there, dir/generation_config.json.
//   NOT_FOUND         no config.json.
//   INVALID_ARGUMENT  not JSON, a field missing, of another type or out of range, by name.
//   UNIMPLEMENTED     another architecture, activation, bias, rope type or sliding
//                     window, by name.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& dir);

}  // namespace winnow
