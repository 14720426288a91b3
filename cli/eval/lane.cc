#include "cli/eval/lane.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/kv/kv_mode.h"

namespace winnow::cli {

absl::StatusOr<std::unique_ptr<Lane>> Lane::Create(const LaneOptions& options, const EvalMode& mode,
                                                   ActivationType activations,
                                                   std::shared_ptr<const Model> model) {
  RuntimeOptions runtime{.model_dir = options.model_dir,
                         .adapter_dir = options.adapter_dir,
                         .kv_mode = mode.kv_mode,
                         .prefill_chunk = std::min(options.prefill_chunk, options.context),
                         .max_num_seqs = 1,
                         .max_model_len = options.context,
                         .threads = options.threads,
                         .activations = activations,
                         .dms_threshold = mode.threshold};
  // Room for one sequence, nothing evicted: twice the dense BF16 bytes is ample.
  const ModelConfig& config = model->config();
  const size_t spans = static_cast<size_t>(config.num_layers) * config.num_kv_heads;
  const size_t dense = spans * static_cast<size_t>(options.context) *
                       kernels::TokenBytes(kernels::KvFormatId::kBf16, config.head_dim);
  const size_t tails = spans * 2 * (kernels::PageBytes(config.head_dim) + 1024);
  runtime.kv_budget_bytes = 2 * dense + tails;
  WINNOW_ASSIGN_OR_RETURN(std::unique_ptr<Runtime> created,
                          Runtime::Create(runtime, std::move(model)));
  return std::unique_ptr<Lane>(new Lane(mode.name, std::move(created)));
}

std::string Lane::Describe() const {
  const KvCacheOptions& cache = runtime_->cache()->options();
  const auto& digest = model().digest();
  return absl::StrCat(
      KvModeName(runtime_->kv_mode()), " ", DescribeRule(runtime_->decision_rule()), " window ",
      cache.window, " shift ", cache.shift,
      runtime_->options().activations == ActivationType::kBf16 ? " bf16 " : " float32 ",
      absl::BytesToHexString(
          absl::string_view(reinterpret_cast<const char*>(digest.data()), digest.size())));
}

absl::Status Lane::Begin() {
  cache_.reset();
  WINNOW_ASSIGN_OR_RETURN(cache_, runtime_->cache()->NewSequence());
  return absl::OkStatus();
}

absl::Status Lane::Run(absl::Span<const int32_t> tokens, float* logits, uint8_t* decisions) {
  WINNOW_RETURN_IF_ERROR(cache_->BeginStep(static_cast<int>(tokens.size())));
  const Transformer::Item item{.cache = &*cache_,
                               .tokens = tokens,
                               .logits = logits,
                               .all_logits = true,
                               .decisions = decisions};
  return runtime_->transformer()->Forward({&item, 1});
}

absl::StatusOr<std::shared_ptr<const Model>> LaneModels::Get(const std::string& kv_mode) {
  WINNOW_ASSIGN_OR_RETURN(const KvMode mode, ParseKvMode(kv_mode));
  std::shared_ptr<const Model>& model = mode.dms ? dms_ : dense_;
  if (model == nullptr) {
    WINNOW_ASSIGN_OR_RETURN(
        model, Runtime::LoadModel(
                   {.model_dir = model_dir_, .adapter_dir = adapter_dir_, .kv_mode = kv_mode}));
  }
  return model;
}

}  // namespace winnow::cli
