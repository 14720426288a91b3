#include "tests/testing/tiny_model.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "absl/strings/str_cat.h"
#include "common/base/bf16.h"
#include "common/base/check.h"

namespace winnow::testing {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kEndOfText = 256;

void WriteFile(const std::string& path, const std::string& content) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(content.data(), static_cast<std::streamsize>(content.size()));
  WINNOW_CHECK(out.good());
}

// Standard library distributions differ between implementations; this does not.
class Gaussian {
 public:
  explicit Gaussian(uint64_t seed) : engine_(seed) {}
  float operator()() {
    // The sum of 12 uniforms: mean 6, variance 1.
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += static_cast<double>(engine_() >> 11) * 0x1p-53;
    return static_cast<float>(sum);
  }

 private:
  std::mt19937_64 engine_;
};

NamedTensor Random(Gaussian* random, std::string name, std::vector<int64_t> dims, float mean,
                   float deviation) {
  NamedTensor tensor{.name = std::move(name), .dims = std::move(dims)};
  int64_t count = 1;
  for (int64_t dim : tensor.dims) count *= dim;
  for (int64_t i = 0; i < count; ++i) tensor.values.push_back(mean + deviation * (*random)());
  return tensor;
}

// Rows whose products with normed rows have about the given deviation.
NamedTensor Linear(Gaussian* random, const std::string& name, int out, int in, float deviation) {
  return Random(random, name, {out, in}, 0.0f, deviation / std::sqrt(static_cast<float>(in)));
}

std::vector<NamedTensor> RandomWeights(const TinyModelOptions& o) {
  Gaussian random(o.seed);
  const auto norm = [&](const std::string& name, int size) {
    return Random(&random, name, {size}, 1.0f, 0.1f);
  };
  std::vector<NamedTensor> tensors;
  tensors.push_back(Random(&random, "model.embed_tokens.weight", {o.vocab, o.hidden}, 0.0f, 1.0f));
  for (int i = 0; i < o.num_layers; ++i) {
    const std::string layer = absl::StrCat("model.layers.", i, ".");
    const std::string attn = layer + "self_attn.", mlp = layer + "mlp.";
    const int q = o.num_heads * o.head_dim, kv = o.num_kv_heads * o.head_dim;
    tensors.push_back(norm(layer + "input_layernorm.weight", o.hidden));
    tensors.push_back(norm(layer + "post_attention_layernorm.weight", o.hidden));
    tensors.push_back(Linear(&random, attn + "q_proj.weight", q, o.hidden, 1.5f));
    tensors.push_back(Linear(&random, attn + "k_proj.weight", kv, o.hidden, 1.5f));
    tensors.push_back(Linear(&random, attn + "v_proj.weight", kv, o.hidden, 1.0f));
    tensors.push_back(Linear(&random, attn + "o_proj.weight", o.hidden, q, 1.0f));
    if (o.qwen3) {
      tensors.push_back(norm(attn + "q_norm.weight", o.head_dim));
      tensors.push_back(norm(attn + "k_norm.weight", o.head_dim));
    }
    tensors.push_back(Linear(&random, mlp + "gate_proj.weight", o.intermediate, o.hidden, 1.0f));
    tensors.push_back(Linear(&random, mlp + "up_proj.weight", o.intermediate, o.hidden, 1.0f));
    tensors.push_back(Linear(&random, mlp + "down_proj.weight", o.hidden, o.intermediate, 1.0f));
  }
  tensors.push_back(norm("model.norm.weight", o.hidden));
  if (!o.tie_embeddings) {
    tensors.push_back(Linear(&random, "lm_head.weight", o.vocab, o.hidden, 2.0f));
  }
  return tensors;
}

Json Config(const TinyModelOptions& o) {
  Json config = {{"architectures", {o.qwen3 ? "Qwen3ForCausalLM" : "LlamaForCausalLM"}},
                 {"model_type", o.qwen3 ? "qwen3" : "llama"},
                 {"hidden_size", o.hidden},
                 {"intermediate_size", o.intermediate},
                 {"num_hidden_layers", o.num_layers},
                 {"num_attention_heads", o.num_heads},
                 {"num_key_value_heads", o.num_kv_heads},
                 {"head_dim", o.head_dim},
                 {"vocab_size", o.vocab},
                 {"max_position_embeddings", o.max_positions},
                 {"hidden_act", "silu"},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", 10000.0},
                 {"tie_word_embeddings", o.tie_embeddings},
                 {"bos_token_id", kEndOfText},
                 {"torch_dtype", "bfloat16"}};
  if (!o.eos_ids.empty()) config["eos_token_id"] = kEndOfText;
  if (o.borrowed_dms) {
    config["dms_window_size"] = o.window;
    config["dms_alpha_scale"] = 100.0;
    config["dms_initial_alpha_offset"] = 5.0;
    config["dms_decision_shift"] = o.shift;
  }
  return config;
}

std::string Utf8(int code) {
  WINNOW_CHECK(code < 0x800);
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3F))};
}

// The character that stands for a byte in a byte-level vocabulary: itself where it
// prints, else the next free one from U+0100.
Json ByteVocab() {
  Json vocab = Json::object();
  int free_code = 0x100, id = 0;
  for (int byte = 0; byte < 256; ++byte) {
    const bool prints = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) ||
                        (byte >= 0xAE && byte <= 0xFF);
    vocab[Utf8(prints ? byte : free_code++)] = id++;
  }
  return vocab;
}

Json TokenizerJson(const std::vector<std::string>& specials) {
  Json added = Json::array();
  for (size_t i = 0; i < specials.size(); ++i) {
    added.push_back({{"id", kEndOfText + static_cast<int>(i)},
                     {"content", specials[i]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "ByteLevel"},
            {"add_prefix_space", false},
            {"trim_offsets", true},
            {"use_regex", true}}},
          {"post_processor", nullptr},
          {"decoder",
           {{"type", "ByteLevel"},
            {"add_prefix_space", true},
            {"trim_offsets", true},
            {"use_regex", true}}},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"vocab", ByteVocab()},
            {"merges", Json::array()}}}};
}

void WriteTokenizer(const std::string& dir) {
  const std::vector<std::string> specials = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
  WriteFile(dir + "/tokenizer.json", TokenizerJson(specials).dump(1));
  const std::string chatml =
      "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
      "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
      "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}";
  const Json config = {{"add_bos_token", false},
                       {"bos_token", specials[0]},
                       {"eos_token", specials[2]},
                       {"tokenizer_class", "GPT2Tokenizer"},
                       {"chat_template", chatml}};
  WriteFile(dir + "/tokenizer_config.json", config.dump(1));
}

}  // namespace

void WriteSafetensors(const std::string& path, const std::vector<NamedTensor>& tensors) {
  Json header = Json::object();
  std::string data;
  for (const NamedTensor& tensor : tensors) {
    const size_t begin = data.size();
    for (float value : tensor.values) {
      const Bf16 rounded = ToBf16(value);
      if (tensor.f32) {
        data.append(reinterpret_cast<const char*>(&value), sizeof(value));
      } else {
        data.append(reinterpret_cast<const char*>(&rounded), sizeof(rounded));
      }
    }
    header[tensor.name] = {{"dtype", tensor.f32 ? "F32" : "BF16"},
                           {"shape", tensor.dims},
                           {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string length(8, '\0');
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(text.size() >> (8 * i));
  WriteFile(path, length + text + data);
}

void WriteTinyModel(const std::string& dir, const TinyModelOptions& options) {
  WriteFile(dir + "/config.json", Config(options).dump(1));
  Json generation = Json::object();
  if (!options.eos_ids.empty()) generation["eos_token_id"] = options.eos_ids;
  WriteFile(dir + "/generation_config.json", generation.dump(1));
  WriteSafetensors(dir + "/model.safetensors", RandomWeights(options));
  WriteTokenizer(dir);
}

void WriteTinyAdapter(const std::string& dir, const TinyModelOptions& model,
                      const TinyAdapterOptions& options) {
  Json metadata = {{"dms_window_size", options.window}, {"dms_alpha_scale", 100.0},
                   {"dms_initial_alpha_offset", 5.0},   {"dms_separate_alpha", true},
                   {"dms_alpha_per", "head"},           {"dms_decision_shift", options.shift}};
  const int rank = options.lora_rank;
  if (rank > 0) {
    metadata["lora_rank"] = rank;
    metadata["lora_alpha"] = 2.0 * rank;
  }
  WriteFile(dir + "/dms_metadata.json", metadata.dump(1));
  Gaussian random(options.seed);
  std::vector<NamedTensor> tensors;
  const int q = model.num_heads * model.head_dim, kv = model.num_kv_heads * model.head_dim;
  for (int i = 0; i < model.num_layers; ++i) {
    const std::string attn = absl::StrCat("model.layers.", i, ".self_attn.");
    tensors.push_back(
        Linear(&random, attn + "dms_proj_alpha.weight", model.num_kv_heads, model.hidden, 1.0f));
    tensors.push_back(
        Random(&random, attn + "dms_proj_alpha_norm.weight", {model.hidden}, 1.0f, 0.1f));
    if (rank == 0) continue;
    const struct {
      const char* name;
      int out, in;
    } updates[] = {{"q", q, model.hidden},
                   {"k", kv, model.hidden},
                   {"v", kv, model.hidden},
                   {"o", model.hidden, q}};
    for (const auto& [name, out, in] : updates) {
      const std::string stem = absl::StrCat(attn, name, "_proj.lora_");
      tensors.push_back(Linear(&random, stem + "A", rank, in, 1.0f));
      tensors.push_back(Linear(&random, stem + "B", out, rank, 0.2f));
    }
  }
  for (NamedTensor& tensor : tensors) tensor.f32 = true;
  WriteSafetensors(dir + "/dms_adapter.safetensors", tensors);
}

}  // namespace winnow::testing
