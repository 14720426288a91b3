#include "bench/quality/format_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/base/bf16.h"
#include "common/base/check.h"
#include "common/base/fp8.h"
#include "common/base/status_macros.h"
#include "kernels/hadamard.h"
#include "kernels/rope.h"

namespace winnow {
namespace {

using kernels::PackedMatrix;

std::vector<float> Unpack(const PackedMatrix& w) {
  std::vector<float> rows(static_cast<size_t>(w.n()) * w.k());
  for (int i = 0; i < w.n(); ++i) w.Row(i, rows.data() + int64_t{i} * w.k());
  return rows;
}

PackedMatrix Pack(const std::vector<float>& rows, int n, int k) {
  std::vector<Bf16> bf16(rows.size());
  std::transform(rows.begin(), rows.end(), bf16.begin(), ToBf16);
  return PackedMatrix::Pack(bf16.data(), n, k);
}

}  // namespace

FormatBackend::FormatBackend(FormatVariant variant, const Model* model, ThreadPool* pool)
    : CpuBackend(pool),
      variant_(variant),
      model_(*model),
      head_amax_(static_cast<size_t>(model->config().num_layers) * model->config().num_kv_heads *
                 2) {
  if (variant == FormatVariant::kFoldedV) FoldWeights();
}

// V's rows of qkv become H V, the columns of o that read them o H.
void FormatBackend::FoldWeights() {
  const ModelConfig& config = model_.config();
  const int dim = config.head_dim;
  for (const LayerWeights& layer : model_.weights().layers) {
    std::vector<float> qkv = Unpack(layer.qkv);
    std::vector<float> column(static_cast<size_t>(dim));
    for (int g = 0; g < config.num_kv_heads; ++g) {
      const int64_t first = config.q_size() + config.kv_size() + int64_t{g} * dim;
      for (int c = 0; c < config.hidden; ++c) {
        float* at = qkv.data() + first * config.hidden + c;
        for (int d = 0; d < dim; ++d) column[d] = at[int64_t{d} * config.hidden];
        kernels::HadamardRotate(dim, column.data());
        for (int d = 0; d < dim; ++d) at[int64_t{d} * config.hidden] = column[d];
      }
    }
    std::vector<float> o = Unpack(layer.o);
    for (size_t i = 0; i < o.size(); i += dim) kernels::HadamardRotate(dim, o.data() + i);
    folded_.emplace(&layer.qkv, Pack(qkv, layer.qkv.n(), layer.qkv.k()));
    folded_.emplace(&layer.o, Pack(o, layer.o.n(), layer.o.k()));
  }
}

absl::Status FormatBackend::Gemm(const kernels::GemmParams& params) {
  kernels::GemmParams p = params;
  if (const auto it = folded_.find(p.w); it != folded_.end()) p.w = &it->second;
  return CpuBackend::Gemm(p);
}

absl::Status FormatBackend::DmsCompact(const kernels::DmsCompactParams& params) {
  const int layer = calls_++ % model_.config().num_layers;
  kernels::DmsCompactParams p = params;
  if (variant_ == FormatVariant::kFoldedV) {
    // V comes rotated; the op rotates it again: it must not arrive so.
    const int64_t width = int64_t{p.num_kv_heads} * p.head_dim;
    v_.resize(static_cast<size_t>(p.num_tokens * width));
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      std::memcpy(v_.data() + t * width, p.v + t * p.v_stride,
                  static_cast<size_t>(width) * sizeof(float));
      for (int g = 0; g < p.num_kv_heads; ++g) {
        kernels::HadamardRotate(p.head_dim, v_.data() + t * width + g * p.head_dim);
      }
    }
    p.v = v_.data();
    p.v_stride = width;
  }
  WINNOW_RETURN_IF_ERROR(CpuBackend::DmsCompact(p));
  if (variant_ != FormatVariant::kNone && variant_ != FormatVariant::kFoldedV) {
    WINNOW_CHECK(p.format == kernels::KvFormatId::kFp8 && p.k_norm == nullptr);
    Requantize(p, layer);
  }
  return absl::OkStatus();
}

// As a float16; `head_amax`: of this layer, head and part.
uint16_t FormatBackend::ScaleOf(const float* x, int head_dim, float* head_amax) const {
  if (variant_ == FormatVariant::kFp8Raw) return ToHalf(1.0f);
  float amax = 0.0f;
  for (int d = 0; d < head_dim; ++d) amax = std::max(amax, std::fabs(x[d]));
  if (variant_ == FormatVariant::kFp8Head) {
    if (calibrating_) *head_amax = std::max(*head_amax, amax);
    amax = *head_amax;
  }
  uint16_t scale = std::max<uint16_t>(ToHalf(amax / kE4m3Max), 1);
  while (HalfToFloat(scale) * kE4m3Max < amax) ++scale;
  return scale;
}

// Overwrites the rows by the variant's.
void FormatBackend::Requantize(const kernels::DmsCompactParams& p, int layer) {
  const int dim = p.head_dim;
  const size_t token_bytes = kernels::TokenBytes(p.format, dim);
  std::vector<float> x(static_cast<size_t>(dim));
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int g = 0; g < p.num_kv_heads; ++g) {
      uint8_t* row = p.rows + (t * p.num_kv_heads + g) * static_cast<int64_t>(token_bytes);
      for (int part = 0; part < 2; ++part) {
        const float* from = part == 0 ? p.k + t * p.k_stride : p.v + t * p.v_stride;
        std::copy_n(from + int64_t{g} * dim, dim, x.begin());
        if (part == 0) {
          const int64_t at = int64_t{p.positions[t]} * (dim / 2);
          kernels::ApplyRope(p.rope_cos + at, p.rope_sin + at, dim, x.data());
        }
        float* head_amax =
            &head_amax_[(static_cast<size_t>(layer) * p.num_kv_heads + g) * 2 + part];
        const uint16_t scale = ScaleOf(x.data(), dim, head_amax);
        for (int d = 0; d < dim; ++d) row[part * dim + d] = ToE4m3(x[d] / HalfToFloat(scale));
        std::memcpy(row + 2 * dim + 2 * part, &scale, 2);
      }
    }
  }
}

absl::Status FormatBackend::DmsPrefillAttention(const kernels::DmsPrefillAttentionParams& p) {
  WINNOW_RETURN_IF_ERROR(CpuBackend::DmsPrefillAttention(p));
  if (variant_ != FormatVariant::kFoldedV) return absl::OkStatus();
  WINNOW_CHECK(p.out_f32 != nullptr);
  // The folded weights read rotated output; the op has rotated it back.
  const int dim = p.layout.head_dim;
  for (int64_t i = 0; i < int64_t{p.num_tokens} * p.num_heads; ++i) {
    kernels::HadamardRotate(dim, p.out_f32 + i * dim);
  }
  return absl::OkStatus();
}

}  // namespace winnow
