#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "common/model/cpu_backend.h"
#include "common/model/model.h"

namespace winnow {

// What a cache could store but does not, in place of what its format says.
enum class FormatVariant {
  kNone,     // the format as it is
  kFp8Raw,   // fp8: codes of the values themselves
  kFp8Head,  // fp8: one scale for each layer, KV head and K or V, from a calibration
  kFp8Amax,  // fp8: the smallest scale of a token that saturates nothing
  kFoldedV,  // a rotated format: V's rotation is in the weights, rounded to BF16 again
};

// The CPU's ops with stored rows or weights changed to a variant; prefill alone.
class FormatBackend final : public CpuBackend {
 public:
  // `model` and `pool` must outlive *this.
  FormatBackend(FormatVariant variant, const Model* model, ThreadPool* pool);

  // While on, kFp8Head widens its scales by what it sees.
  void set_calibrating(bool on) { calibrating_ = on; }

  absl::Status Gemm(const kernels::GemmParams& params) override;
  absl::Status DmsCompact(const kernels::DmsCompactParams& params) override;
  absl::Status DmsPrefillAttention(const kernels::DmsPrefillAttentionParams& params) override;

 private:
  void FoldWeights();
  void Requantize(const kernels::DmsCompactParams& params, int layer);
  uint16_t ScaleOf(const float* x, int head_dim, float* head_amax) const;

  const FormatVariant variant_;
  const Model& model_;
  bool calibrating_ = false;
  int calls_ = 0;                 // of DmsCompact(): one a layer
  std::vector<float> head_amax_;  // [layer, KV head, K or V]
  std::vector<float> v_;          // of a chunk, rotated
  std::map<const kernels::PackedMatrix*, kernels::PackedMatrix> folded_;
};

}  // namespace winnow
