#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/model/model.h"

namespace winnow::cli {

// What a mode computed over one window, for a check by another implementation.
struct Dump {
  std::string mode;
  float threshold = 0;
  std::vector<int32_t> tokens;     // [N]
  std::vector<uint8_t> decisions;  // [layers, N, KV heads]; a token's own bit, 1: evict
  std::vector<float> logits;       // [R, vocab]; of the last R tokens
  int num_layers = 0, num_kv_heads = 0, vocab = 0;
};

// Writes safetensors: "tokens" I32 [N], "decisions" U8 [layers, N, KV heads] (absent in dense
// modes), "logits" F32 [R, vocab]; metadata "mode", "dms_threshold", "dms_window_size",
// "dms_decision_shift", "dms_alpha_scale", "dms_initial_alpha_offset".
//   UNAVAILABLE  the file cannot be written, by name.
absl::Status WriteDump(const std::string& path, const Dump& dump, const Model& model);

}  // namespace winnow::cli
