#include "cli/eval/short_protocol.h"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/eval/lane.h"
#include "cli/eval/modes.h"
#include "cli/eval/progress.h"
#include "cli/eval/score.h"
#include "cli/eval/text.h"
#include "common/base/status_macros.h"

namespace winnow::cli {
namespace {

constexpr int kContext = 1024;
constexpr int kTokens = 16;
constexpr int kPrompts = 4;

// Sums of one mode.
struct ShortScore {
  PositionSums forced;
  int64_t free_match = 0, free_scored = 0;
  double free_kld = 0;
  nlohmann::ordered_json first_difference = nlohmann::ordered_json::array();
  int64_t live = 0, logical = 0;
  double kv_bytes = 0, kv_bytes_base = 0;
};

class ShortProtocol {
 public:
  explicit ShortProtocol(const EvaluateOptions& options) : options_(options) {}

  absl::StatusOr<nlohmann::ordered_json> Run();

 private:
  // Starts over with `prompt`; `row` gets the logits of its last token.
  absl::Status Prefill(absl::Span<const int32_t> prompt, Lane* lane, float* row);
  absl::Status RunBase(absl::Span<const int32_t> prompt);
  absl::Status RunForced(absl::Span<const int32_t> prompt, Lane* lane, ShortScore* score);
  absl::Status RunFree(absl::Span<const int32_t> prompt, Lane* lane, ShortScore* score);
  absl::Span<const float> BaseRow(int step) const {
    return {base_rows_.data() + static_cast<size_t>(step) * vocab_, vocab_};
  }
  absl::Span<const float> Row() const { return {row_.data(), vocab_}; }

  const EvaluateOptions& options_;
  size_t vocab_ = 0;
  std::unique_ptr<Lane> base_;
  std::vector<float> piece_, row_;    // [chunk, vocab], [vocab]
  std::vector<float> base_rows_;      // [kTokens, vocab] of the prompt at hand
  std::vector<RowStats> base_stats_;  // [kTokens]
  std::vector<int32_t> base_tokens_;  // [kTokens]
};

absl::Status ShortProtocol::Prefill(absl::Span<const int32_t> prompt, Lane* lane, float* row) {
  WINNOW_RETURN_IF_ERROR(lane->Begin());
  const size_t chunk = static_cast<size_t>(std::min(options_.prefill_chunk, kContext));
  for (size_t begin = 0; begin < prompt.size(); begin += chunk) {
    const absl::Span<const int32_t> part = prompt.subspan(begin, chunk);
    const bool last = begin + part.size() == prompt.size();
    WINNOW_RETURN_IF_ERROR(lane->Run(part, last ? piece_.data() : nullptr));
    if (last) std::copy_n(piece_.data() + (part.size() - 1) * vocab_, vocab_, row);
  }
  return absl::OkStatus();
}

absl::Status ShortProtocol::RunBase(absl::Span<const int32_t> prompt) {
  WINNOW_RETURN_IF_ERROR(Prefill(prompt, base_.get(), base_rows_.data()));
  for (int step = 0; step < kTokens; ++step) {
    const size_t at = static_cast<size_t>(step);
    if (step > 0) {
      WINNOW_RETURN_IF_ERROR(
          base_->Run({&base_tokens_[at - 1], 1}, base_rows_.data() + at * vocab_));
    }
    base_stats_[at] = Summarize(BaseRow(step));
    base_tokens_[at] = base_stats_[at].top;
  }
  return absl::OkStatus();
}

absl::Status ShortProtocol::RunForced(absl::Span<const int32_t> prompt, Lane* lane,
                                      ShortScore* score) {
  WINNOW_RETURN_IF_ERROR(Prefill(prompt, lane, row_.data()));
  for (int step = 0; step < kTokens; ++step) {
    const size_t at = static_cast<size_t>(step);
    if (step > 0) WINNOW_RETURN_IF_ERROR(lane->Run({&base_tokens_[at - 1], 1}, row_.data()));
    score->forced.Add(ScoreRow(BaseRow(step), base_stats_[at], Row(), base_tokens_[at]));
  }
  return absl::OkStatus();
}

absl::Status ShortProtocol::RunFree(absl::Span<const int32_t> prompt, Lane* lane,
                                    ShortScore* score) {
  WINNOW_RETURN_IF_ERROR(Prefill(prompt, lane, row_.data()));
  int32_t token = 0;
  bool same = true;
  for (int step = 0; step < kTokens; ++step) {
    const size_t at = static_cast<size_t>(step);
    if (step > 0) WINNOW_RETURN_IF_ERROR(lane->Run({&token, 1}, row_.data()));
    token = Summarize(Row()).top;
    if (same) {
      score->free_kld += ScoreRow(BaseRow(step), base_stats_[at], Row(), base_tokens_[at]).kld;
      ++score->free_scored;
    }
    if (token == base_tokens_[at]) ++score->free_match;
    if (same && token != base_tokens_[at]) {
      same = false;
      score->first_difference.push_back(step);
    }
  }
  if (same) score->first_difference.push_back(nullptr);
  return absl::OkStatus();
}

absl::StatusOr<nlohmann::ordered_json> ShortProtocol::Run() {
  WINNOW_ASSIGN_OR_RETURN(const std::vector<EvalMode> modes,
                          ParseEvalModes(options_.modes, options_.thresholds));
  WINNOW_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                          ReadTokens(options_.model_dir, options_.text_file));
  WINNOW_ASSIGN_OR_RETURN(
      const std::vector<EvalWindow> prompts,
      PlanWindows(static_cast<int64_t>(tokens.size()), kContext, kPrompts, Scoring::kAll, 0));
  const LaneOptions lane_options{.model_dir = options_.model_dir,
                                 .adapter_dir = options_.adapter_dir,
                                 .context = kContext + kTokens,
                                 .prefill_chunk = options_.prefill_chunk,
                                 .threads = options_.threads};
  LaneModels models(options_.model_dir, options_.adapter_dir);
  WINNOW_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, models.Get(kBaseMode));
  vocab_ = static_cast<size_t>(model->config().vocab_size);
  WINNOW_ASSIGN_OR_RETURN(base_,
                          Lane::Create(lane_options, {.name = kBaseMode, .kv_mode = kBaseMode},
                                       ActivationType::kFloat32, std::move(model)));
  piece_.resize(static_cast<size_t>(std::min(options_.prefill_chunk, kContext)) * vocab_);
  row_.resize(vocab_);
  base_rows_.resize(kTokens * vocab_);
  base_stats_.resize(kTokens);
  base_tokens_.resize(kTokens);

  std::vector<std::unique_ptr<Lane>> lanes;
  for (const EvalMode& mode : modes) {
    WINNOW_ASSIGN_OR_RETURN(model, models.Get(mode.kv_mode));
    WINNOW_ASSIGN_OR_RETURN(
        lanes.emplace_back(),
        Lane::Create(lane_options, mode,
                     options_.bf16_activations ? ActivationType::kBf16 : ActivationType::kFloat32,
                     std::move(model)));
  }
  std::vector<ShortScore> scores(lanes.size());
  Progress progress(options_.progress, "runs",
                    static_cast<int64_t>(kPrompts * (1 + 2 * lanes.size())));
  for (const EvalWindow& window : prompts) {
    const absl::Span<const int32_t> prompt =
        absl::MakeConstSpan(tokens).subspan(static_cast<size_t>(window.begin), kContext);
    WINNOW_RETURN_IF_ERROR(RunBase(prompt));
    progress.Advance(1);
    for (size_t i = 0; i < lanes.size(); ++i) {
      ShortScore& score = scores[i];
      WINNOW_RETURN_IF_ERROR(RunFree(prompt, lanes[i].get(), &score));
      progress.Advance(1);
      WINNOW_RETURN_IF_ERROR(RunForced(prompt, lanes[i].get(), &score));
      progress.Advance(1);
      const SequenceCache& cache = lanes[i]->cache();
      const ModelConfig& config = lanes[i]->model().config();
      score.live += cache.live_tokens();
      score.logical += int64_t{cache.length()} * config.num_layers * config.num_kv_heads;
      score.kv_bytes += static_cast<double>(cache.bytes_held());
      score.kv_bytes_base += static_cast<double>(base_->cache().bytes_held());
    }
  }

  nlohmann::ordered_json result;
  result["protocol"] = "short";
  result["model"] = options_.model_dir;
  result["adapter"] = options_.adapter_dir;
  result["text"] = options_.text_file;
  result["context"] = kContext;
  result["tokens"] = kTokens;
  result["prompts"] = kPrompts;
  result["activations"] = options_.bf16_activations ? "bf16" : "float32";
  constexpr double kPositions = kPrompts * kTokens;
  for (size_t i = 0; i < modes.size(); ++i) {
    const ShortScore& score = scores[i];
    const double forced = static_cast<double>(score.forced.positions);
    nlohmann::ordered_json row;
    row["teacher_forced"] = {{"kld", score.forced.kld / forced},
                             {"token_match", static_cast<double>(score.forced.same_top) / forced},
                             {"ppl", std::exp(score.forced.nll / forced)},
                             {"ppl_base", std::exp(score.forced.nll_base / forced)},
                             {"scored", score.forced.positions},
                             {"positions", kPrompts * kTokens}};
    row["free_running"] = {{"kld", score.free_kld / static_cast<double>(score.free_scored)},
                           {"token_match", static_cast<double>(score.free_match) / kPositions},
                           {"first_difference", score.first_difference},
                           {"scored", score.free_scored},
                           {"positions", kPrompts * kTokens}};
    row["live_ratio"] = static_cast<double>(score.logical) / static_cast<double>(score.live);
    row["kv_bytes"] = score.kv_bytes / kPrompts;
    row["kv_bytes_dense_bf16"] = score.kv_bytes_base / kPrompts;
    if (modes[i].dms) row["dms_threshold"] = modes[i].threshold;
    result["modes"][modes[i].name] = std::move(row);
  }
  return result;
}

}  // namespace

absl::StatusOr<nlohmann::ordered_json> EvaluateShort(const EvaluateOptions& options) {
  return ShortProtocol(options).Run();
}

}  // namespace winnow::cli
