#include "common/engine/runtime.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/log.h"
#include "common/base/status_macros.h"

namespace winnow {
namespace {

absl::Status CheckRange(const char* name, int value, int low, int high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, "=", value, " is outside [", low, ", ", high, "]"));
}

absl::Status CheckOptions(const RuntimeOptions& options) {
  WINNOW_RETURN_IF_ERROR(CheckRange("threads", options.threads, 1, 1024));
  WINNOW_RETURN_IF_ERROR(CheckRange("prefill_chunk", options.prefill_chunk, 1, 65536));
  return CheckRange("max_num_seqs", options.max_num_seqs, 1, 4096);
}

}  // namespace

size_t SingleSequenceKvBudget(const ModelConfig& config, int max_len) {
  // No format takes more than BF16. Twice that, and two pages a span, are ample for page
  // ends and tables.
  const size_t spans = static_cast<size_t>(config.num_layers) * config.num_kv_heads;
  const size_t dense = spans * static_cast<size_t>(max_len) *
                       kernels::TokenBytes(kernels::KvFormatId::kBf16, config.head_dim);
  const size_t ends = spans * 2 * (kernels::PageBytes(config.head_dim) + 1024);
  return 2 * dense + ends;
}

absl::StatusOr<std::shared_ptr<const Model>> Runtime::LoadModel(const RuntimeOptions& options) {
  WINNOW_ASSIGN_OR_RETURN(const KvMode mode, ParseKvMode(options.kv_mode, options.kv_format));
  // Dense modes run the model's own weights: an adapter may bring a weight update.
  return Model::Load(options.model_dir, mode.dms ? options.adapter_dir : std::string());
}

absl::StatusOr<std::unique_ptr<Runtime>> Runtime::Create(const RuntimeOptions& options) {
  WINNOW_RETURN_IF_ERROR(CheckOptions(options));
  WINNOW_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, LoadModel(options));
  return Create(options, std::move(model));
}

absl::StatusOr<std::unique_ptr<Runtime>> Runtime::Create(const RuntimeOptions& options,
                                                         std::shared_ptr<const Model> shared) {
  WINNOW_RETURN_IF_ERROR(CheckOptions(options));
  std::unique_ptr<Runtime> runtime(new Runtime(options));
  WINNOW_ASSIGN_OR_RETURN(runtime->kv_mode_, ParseKvMode(options.kv_mode, options.kv_format));
  const bool dms = runtime->kv_mode_.dms;
  runtime->model_ = std::move(shared);
  const Model& model = *runtime->model_;
  const ModelConfig& config = model.config();
  if (dms && !model.dms().has_value()) {
    return absl::FailedPreconditionError(
        absl::StrCat("kv_mode=", options.kv_mode, " needs DMS data, and neither ",
                     options.model_dir, " nor an adapter has any"));
  }
  int& max_model_len = runtime->options_.max_model_len;
  if (max_model_len == 0) max_model_len = config.max_position_embeddings;
  WINNOW_RETURN_IF_ERROR(
      CheckRange("max_model_len", max_model_len, 2, config.max_position_embeddings));
  // No chunk is longer than a sequence.
  runtime->options_.prefill_chunk = std::min(options.prefill_chunk, max_model_len);

  WINNOW_ASSIGN_OR_RETURN(runtime->cache_,
                          KvCache::Create({.format = runtime->kv_mode_.format,
                                           .num_layers = config.num_layers,
                                           .num_kv_heads = config.num_kv_heads,
                                           .head_dim = config.head_dim,
                                           .window = dms ? model.dms()->window : 0,
                                           .shift = dms ? model.dms()->shift : 1,
                                           .budget_bytes = options.kv_budget_bytes,
                                           // As many again may be on their way in or out.
                                           .max_sequences = 2 * options.max_num_seqs}));
  runtime->transformer_ = std::make_unique<Transformer>(
      &model, runtime->cache_.get(), &runtime->pool_,
      Transformer::Options{.max_tokens = runtime->options_.prefill_chunk + options.max_num_seqs,
                           .activations = options.activations,
                           .dms_threshold = options.dms_threshold});
  const KvCache& cache = *runtime->cache_;
  LogLine(LogLevel::kInfo, "kv_budget",
          absl::StrCat(LogField("kv_mode", KvModeName(runtime->kv_mode_)),
                       LogField("bytes", cache.allocated_bytes()),
                       LogField("pages", cache.pool().total()),
                       LogField("page_bytes", cache.page_bytes()),
                       LogField("spans_per_sequence", cache.num_spans()),
                       LogField("dense_tokens", cache.pool().total() / cache.num_spans() *
                                                    cache.layout().slots_per_page)));
  return runtime;
}

std::string Runtime::Describe() const {
  const KvCacheOptions& cache = cache_->options();
  const auto& digest = model_->digest();
  return absl::StrCat(KvModeName(kv_mode_), " ", DescribeRule(transformer_->decision_rule()),
                      " window ", cache.window, " shift ", cache.shift,
                      options_.activations == ActivationType::kBf16 ? " bf16 " : " float32 ",
                      absl::BytesToHexString(absl::string_view(
                          reinterpret_cast<const char*>(digest.data()), digest.size())));
}

std::unique_ptr<Engine> Runtime::NewEngine(EventSink* sink, int max_waiting) {
  return std::make_unique<Engine>(EngineOptions{.prefill_chunk = options_.prefill_chunk,
                                                .max_num_seqs = options_.max_num_seqs,
                                                .max_waiting = max_waiting,
                                                .max_model_len = options_.max_model_len},
                                  model_->config().vocab_size, cache_.get(), transformer_.get(),
                                  sink);
}

}  // namespace winnow
