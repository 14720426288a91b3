#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace winnow::testing {

// A tensor for WriteSafetensors(); written as BF16 unless `f32`.
struct NamedTensor {
  std::string name;
  std::vector<int64_t> dims;
  std::vector<float> values = {};
  bool f32 = false;
};
void WriteSafetensors(const std::string& path, const std::vector<NamedTensor>& tensors);

// A decoder with random weights that computes something sensible in milliseconds. Its
// tokenizer.json has the 256 bytes (ids as ByteLevel orders them) and
// "<|endoftext|>" 256, "<|im_start|>" 257, "<|im_end|>" 258; the chat template is ChatML.
struct TinyModelOptions {
  bool qwen3 = false;  // else Llama
  bool tie_embeddings = true;
  uint64_t seed = 1;
  int num_layers = 2;
  int hidden = 64;
  int intermediate = 96;
  int num_heads = 4;
  int num_kv_heads = 2;
  int head_dim = 16;
  int vocab = 259;
  int max_positions = 2048;
  // Token ids of generation_config.json; empty: nothing ends generation.
  std::vector<int> eos_ids = {258};
  // DMS keys in config.json: the borrowed query channel decides, and evicts about half.
  bool borrowed_dms = false;
  int window = 8;
  int shift = 1;
};

// Writes config.json, generation_config.json, model.safetensors, tokenizer.json and
// tokenizer_config.json. `dir` must exist.
void WriteTinyModel(const std::string& dir, const TinyModelOptions& options = {});

// Writes a DMS adapter for the model of the same options: dms_metadata.json and
// dms_adapter.safetensors with projections that evict about half, and low-rank updates
// of q, k, v and o if lora_rank > 0.
struct TinyAdapterOptions {
  int window = 8;
  int shift = 1;
  int lora_rank = 0;
  uint64_t seed = 2;
};
void WriteTinyAdapter(const std::string& dir, const TinyModelOptions& model = {},
                      const TinyAdapterOptions& options = {});

}  // namespace winnow::testing
