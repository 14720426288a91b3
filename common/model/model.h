#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "common/dms/dms_config.h"
#include "common/model/model_config.h"
#include "common/model/weights.h"

namespace winnow {

// A checkpoint in memory: configuration, packed weights, DMS data if there is any.
// Immutable after Load(): any thread may read it.
class Model {
 public:
  // Reads a Hugging Face directory (config.json, safetensors, generation_config.json)
  // and, unless `adapter_dir` is empty, a DMS adapter (dms_metadata.json and one
  // safetensors file with dms_proj_alpha tensors). DMS settings may also stand in
  // the model directory itself (dms_metadata.json, config.json keys).
  //   NOT_FOUND            no such directory or file.
  //   INVALID_ARGUMENT     malformed file, by name; a tensor of the wrong shape.
  //   UNIMPLEMENTED        another architecture, dtype or rope scaling, by name.
  //   FAILED_PRECONDITION  an adapter that does not fit the model.
  static absl::StatusOr<std::unique_ptr<Model>> Load(const std::string& model_dir,
                                                     const std::string& adapter_dir);

  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  // Unset: the checkpoint has no DMS data, so dms- modes are refused.
  const std::optional<DmsConfig>& dms() const { return dms_; }
  // LoadedWeights::digest: names, shapes and bytes of the tensors read, adapter included.
  const std::array<uint8_t, 32>& digest() const { return digest_; }

 private:
  Model() = default;

  ModelConfig config_;
  Weights weights_;
  std::optional<DmsConfig> dms_;
  std::array<uint8_t, 32> digest_{};
};

}  // namespace winnow
