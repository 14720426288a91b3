#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "common/base/thread_pool.h"
#include "common/dms/dms_config.h"
#include "common/model/model_config.h"
#include "common/tensor/safetensors.h"
#include "kernels/cpu/weight_arena.h"
#include "kernels/gemm.h"

namespace winnow {

struct LayerWeights {
  std::vector<float> input_norm;  // [hidden]
  kernels::PackedMatrix qkv;      // [q_size + 2 * kv_size, hidden]: q, k, v heads
  std::vector<float> q_norm;      // [head_dim]; empty: none
  std::vector<float> k_norm;      // as q_norm
  kernels::PackedMatrix o;        // [hidden, q_size]
  std::vector<float> mlp_norm;    // [hidden]
  kernels::PackedMatrix gate_up;  // [2 * intermediate, hidden]: gate, up
  kernels::PackedMatrix down;     // [hidden, intermediate]
  // The projection that decides (DecisionSource::kLogits); else empty.
  std::vector<float> alpha_norm;  // [hidden]
  std::vector<float> alpha;       // [num_kv_heads, hidden]
  std::vector<float> alpha_bias;  // [num_kv_heads]; empty: none
};

struct Weights {
  std::unique_ptr<kernels::WeightArena> arena;  // the matrices' memory
  kernels::PackedMatrix embedding;              // [vocab, hidden]
  std::vector<LayerWeights> layers;             // [num_layers]
  std::vector<float> final_norm;                // [hidden]
  kernels::PackedMatrix lm_head;                // [vocab, hidden]; empty: tied to the embedding

  const kernels::PackedMatrix& output() const { return lm_head.n() > 0 ? lm_head : embedding; }
};

// What weights are made of. Nothing is kept.
struct WeightSources {
  const TensorFiles* model = nullptr;
  const TensorFiles* adapter = nullptr;  // null: none
  bool needs_alpha = false;              // the dms_proj_alpha tensors, from adapter or model
  float lora_alpha = 0.0f;               // scale of the adapter's low-rank updates, times rank
};

struct LoadedWeights {
  Weights weights;
  // SHA-256 over name, type, shape and SHA-256 of the bytes of each tensor read, the
  // model's in order of names, then the adapter's.
  std::array<uint8_t, 32> digest{};
};

// Converts and packs the tensors that `config` asks for. Matrices are rounded to BF16,
// after the adapter's updates lora_alpha / rank * lora_B [out, rank] * lora_A [rank, in]
// of q, k, v and o were added in float32.
//   INVALID_ARGUMENT     a tensor is missing or has the wrong shape, by name.
//   UNIMPLEMENTED        its type is not BF16, F16 or F32.
//   FAILED_PRECONDITION  either in the adapter, or it has a tensor of no use here.
absl::StatusOr<LoadedWeights> LoadWeights(const ModelConfig& config, const WeightSources& sources,
                                          ThreadPool* pool);

}  // namespace winnow
