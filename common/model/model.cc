#include "common/model/model.h"

#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tensor/small_file.h"
#include "kernels/kv_format.h"

namespace winnow {
namespace {

constexpr size_t kMaxMetadataBytes = size_t{16} << 20;

// lora_alpha of an adapter's dms_metadata.json; 0 if it has none.
absl::StatusOr<float> ReadLoraAlpha(const std::string& adapter_dir) {
  const std::string path = absl::StrCat(adapter_dir, "/dms_metadata.json");
  WINNOW_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxMetadataBytes));
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("lora_alpha")) return 0.0f;
  const auto& value = json["lora_alpha"];
  const double alpha = value.is_number() ? value.get<double>() : 0.0;
  if (!(alpha > 0.0 && alpha < 1e6)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": lora_alpha is not in (0, 1e6)"));
  }
  return static_cast<float>(alpha);
}

// The one safetensors file of an adapter.
absl::StatusOr<std::string> FindAdapterFile(const std::string& dir) {
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(opendir(dir.c_str()), closedir);
  if (listing == nullptr) return absl::NotFoundError(absl::StrCat(dir, ": not a directory"));
  std::vector<std::string> found;
  while (const dirent* entry = readdir(listing.get())) {
    if (absl::EndsWith(entry->d_name, ".safetensors")) found.emplace_back(entry->d_name);
  }
  if (found.empty()) return absl::NotFoundError(absl::StrCat(dir, ": no safetensors file"));
  if (found.size() > 1) {
    std::sort(found.begin(), found.end());
    return absl::InvalidArgumentError(
        absl::StrCat(dir, ": more than one safetensors file: ", found[0], ", ", found[1]));
  }
  return absl::StrCat(dir, "/", found[0]);
}

// An adapter with low-rank updates must say their scale.
absl::Status CheckLoraAlpha(const TensorFiles& adapter, float lora_alpha) {
  for (const auto& [name, view] : adapter.tensors()) {
    if (absl::EndsWith(name, ".lora_A") && lora_alpha == 0.0f) {
      return absl::InvalidArgumentError(
          absl::StrCat("adapter: tensor ", name, " and no lora_alpha in dms_metadata.json"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> Model::Load(const std::string& model_dir,
                                                   const std::string& adapter_dir) {
  struct stat info {};
  if (stat(model_dir.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return absl::NotFoundError(absl::StrCat("model ", model_dir, ": not a directory"));
  }
  std::unique_ptr<Model> model(new Model());
  WINNOW_ASSIGN_OR_RETURN(model->config_, LoadModelConfig(model_dir));
  WINNOW_RETURN_IF_ERROR(kernels::ValidateHeadDim(model->config_.head_dim));
  WINNOW_ASSIGN_OR_RETURN(model->dms_,
                          LoadDmsConfig(model_dir, adapter_dir, model->config_.has_q_norm));
  WINNOW_ASSIGN_OR_RETURN(const auto tensors, TensorFiles::OpenModel(model_dir));
  WeightSources sources{.model = tensors.get()};
  sources.needs_alpha =
      model->dms_.has_value() && model->dms_->rule.source == kernels::DecisionSource::kLogits;
  std::unique_ptr<TensorFiles> adapter;
  if (!adapter_dir.empty()) {
    WINNOW_ASSIGN_OR_RETURN(const std::string path, FindAdapterFile(adapter_dir));
    WINNOW_ASSIGN_OR_RETURN(adapter, TensorFiles::OpenFile(path));
    WINNOW_ASSIGN_OR_RETURN(sources.lora_alpha, ReadLoraAlpha(adapter_dir));
    WINNOW_RETURN_IF_ERROR(CheckLoraAlpha(*adapter, sources.lora_alpha));
    sources.adapter = adapter.get();
  }
  ThreadPool pool(std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 16));
  WINNOW_ASSIGN_OR_RETURN(LoadedWeights loaded, LoadWeights(model->config_, sources, &pool));
  model->weights_ = std::move(loaded.weights);
  model->digest_ = loaded.digest;
  return model;
}

}  // namespace winnow
