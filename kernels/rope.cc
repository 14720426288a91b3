#include "kernels/rope.h"

#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace winnow::kernels {
namespace {

absl::Status CheckPositive(const char* field, float value) {
  if (std::isfinite(value) && value > 0.0f) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, "=", value, " is not a positive number"));
}

// Low frequencies are divided by the factor, high ones stay, between them is a
// linear ramp in original_max_positions / wavelength.
float ScaleFrequency(float inv_freq, const Llama3RopeScaling& s) {
  const float old_len = static_cast<float>(s.original_max_positions);
  const float wavelength = 2.0f * std::numbers::pi_v<float> / inv_freq;
  if (wavelength < old_len / s.high_freq_factor) return inv_freq;
  if (wavelength > old_len / s.low_freq_factor) return inv_freq / s.factor;
  const float smooth =
      (old_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1.0f - smooth) * inv_freq / s.factor + smooth * inv_freq;
}

}  // namespace

absl::StatusOr<RopeTable> BuildRopeTable(int head_dim, int num_positions, float theta,
                                         const Llama3RopeScaling& scaling) {
  if (head_dim < 2 || head_dim % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("head_dim=", head_dim, " is not even"));
  }
  if (num_positions < 1) {
    return absl::InvalidArgumentError(absl::StrCat("num_positions=", num_positions, " is below 1"));
  }
  WINNOW_RETURN_IF_ERROR(CheckPositive("rope_theta", theta));
  WINNOW_RETURN_IF_ERROR(CheckPositive("rope_scaling.factor", scaling.factor));
  if (scaling.factor != 1.0f) {
    WINNOW_RETURN_IF_ERROR(CheckPositive("rope_scaling.low_freq_factor", scaling.low_freq_factor));
    WINNOW_RETURN_IF_ERROR(
        CheckPositive("rope_scaling.high_freq_factor", scaling.high_freq_factor));
    if (scaling.high_freq_factor <= scaling.low_freq_factor) {
      return absl::InvalidArgumentError(
          absl::StrCat("rope_scaling.high_freq_factor=", scaling.high_freq_factor,
                       " is not above low_freq_factor=", scaling.low_freq_factor));
    }
    WINNOW_RETURN_IF_ERROR(CheckPositive("rope_scaling.original_max_position_embeddings",
                                         static_cast<float>(scaling.original_max_positions)));
  }
  const int half = head_dim / 2;
  std::vector<float> inv_freq(static_cast<size_t>(half));
  for (int i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    float f = 1.0f / static_cast<float>(std::pow(static_cast<double>(theta), exponent));
    if (scaling.factor != 1.0f) f = ScaleFrequency(f, scaling);
    inv_freq[static_cast<size_t>(i)] = f;
  }
  RopeTable table{.cos = {}, .sin = {}, .num_positions = num_positions, .head_dim = head_dim};
  const size_t size = static_cast<size_t>(num_positions) * static_cast<size_t>(half);
  table.cos.resize(size);
  table.sin.resize(size);
  for (int p = 0; p < num_positions; ++p) {
    for (int i = 0; i < half; ++i) {
      const float angle = static_cast<float>(p) * inv_freq[static_cast<size_t>(i)];
      const size_t at = static_cast<size_t>(p) * static_cast<size_t>(half) + static_cast<size_t>(i);
      table.cos[at] = static_cast<float>(std::cos(static_cast<double>(angle)));
      table.sin[at] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
  return table;
}

void ApplyRope(const float* cos, const float* sin, int head_dim, float* x) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

}  // namespace winnow::kernels
