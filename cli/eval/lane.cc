#include "cli/eval/lane.h"

#include <algorithm>
#include <utility>

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
  runtime.kv_budget_bytes = SingleSequenceKvBudget(model->config(), options.context);
  WINNOW_ASSIGN_OR_RETURN(std::unique_ptr<Runtime> created,
                          Runtime::Create(runtime, std::move(model)));
  return std::unique_ptr<Lane>(new Lane(mode.name, std::move(created)));
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
