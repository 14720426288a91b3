#include "cli/niah/runner.h"

#include <utility>

#include "absl/time/clock.h"
#include "cli/eval/modes.h"
#include "common/base/status_macros.h"

namespace winnow::cli {

absl::StatusOr<std::unique_ptr<NiahRunner>> NiahRunner::Create(const NiahEngineOptions& options,
                                                               const std::string& mode,
                                                               int max_len) {
  std::unique_ptr<NiahRunner> runner(new NiahRunner);
  WINNOW_ASSIGN_OR_RETURN(const std::vector<EvalMode> parsed, ParseEvalModes({mode}, {}));
  WINNOW_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model_dir));
  WINNOW_ASSIGN_OR_RETURN(runner->tokenizer_, Tokenizer::Load(options.model_dir));
  WINNOW_ASSIGN_OR_RETURN(
      runner->runtime_, Runtime::Create({.model_dir = options.model_dir,
                                         .adapter_dir = options.adapter_dir,
                                         .kv_mode = parsed[0].kv_mode,
                                         .kv_budget_bytes = SingleSequenceKvBudget(config, max_len),
                                         .prefill_chunk = options.prefill_chunk,
                                         .max_num_seqs = 1,
                                         .max_model_len = max_len,
                                         .threads = options.threads,
                                         .dms_threshold = parsed[0].threshold}));
  runner->engine_ = runner->runtime_->NewEngine(runner.get(), /*max_waiting=*/1);
  return runner;
}

absl::StatusOr<NiahOutput> NiahRunner::Run(const std::vector<int32_t>& prompt, int max_new_tokens,
                                           const SamplingParams& sampling, uint64_t seed) {
  output_ = {};
  status_ = absl::OkStatus();
  Request request{.id = next_id_++,
                  .prompt = prompt,
                  .sampling = sampling,
                  .seed = seed,
                  .max_tokens = max_new_tokens,
                  .stop_token_ids = runtime_->model().config().eos_ids};
  start_ = absl::Now();
  WINNOW_RETURN_IF_ERROR(engine_->Add(std::move(request)));
  while (!engine_->idle()) {
    if (!engine_->Step() && !engine_->idle()) {
      return absl::InternalError("the engine has a request and nothing to do");
    }
  }
  output_.total = absl::Now() - start_;
  WINNOW_RETURN_IF_ERROR(status_);
  // Rows of a model may outnumber its tokenizer's ids; those have no text.
  std::vector<int32_t> known;
  for (const int32_t id : output_.ids) {
    if (id < tokenizer_->vocab_size()) known.push_back(id);
  }
  WINNOW_ASSIGN_OR_RETURN(output_.text, tokenizer_->Decode(known, /*skip_special=*/true));
  return std::move(output_);
}

void NiahRunner::OnToken(uint64_t /*id*/, int index, int32_t token, const KvUsage& /*usage*/) {
  if (index == 0) output_.first_token = absl::Now() - start_;
  output_.ids.push_back(token);
}

void NiahRunner::OnFinished(uint64_t /*id*/, FinishReason /*reason*/, const KvUsage& usage) {
  output_.kv = usage;
}

void NiahRunner::OnFailed(uint64_t /*id*/, absl::Status status) { status_ = std::move(status); }

}  // namespace winnow::cli
