#pragma once

#include <vector>

#include "absl/status/statusor.h"

namespace winnow::kernels {

// The llama3 frequency scaling of config.json's "rope_scaling"; factor 1: none.
struct Llama3RopeScaling {
  float factor = 1.0f;
  float low_freq_factor = 1.0f;
  float high_freq_factor = 4.0f;
  int original_max_positions = 8192;
};

// cos and sin of every position, [num_positions, head_dim / 2] each. The angle
// is position * inverse frequency, both float32, as transformers computes it.
struct RopeTable {
  std::vector<float> cos;
  std::vector<float> sin;
  int num_positions = 0;
  int head_dim = 0;
};

// INVALID_ARGUMENT for head_dim odd or < 2, num_positions < 1, theta or a
// scaling field not positive.
absl::StatusOr<RopeTable> BuildRopeTable(int head_dim, int num_positions, float theta,
                                         const Llama3RopeScaling& scaling = {});

// Rotates x [head_dim] in place, channel i paired with i + head_dim / 2.
// cos, sin: one row of the table.
void ApplyRope(const float* cos, const float* sin, int head_dim, float* x);

}  // namespace winnow::kernels
