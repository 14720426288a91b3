#include "cli/eval/evaluate.h"

#include <algorithm>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/types/span.h"
#include "cli/eval/dump.h"
#include "cli/eval/lane.h"
#include "cli/eval/modes.h"
#include "cli/eval/progress.h"
#include "cli/eval/resume.h"
#include "cli/eval/score.h"
#include "cli/eval/text.h"
#include "common/base/status_macros.h"

namespace winnow::cli {
namespace {

constexpr char kNoise[] = "noise";
constexpr int kDumpLogits = 64;  // rows of logits in a dump

const char* ScoringName(Scoring scoring) {
  switch (scoring) {
    case Scoring::kAll:
      return "all";
    case Scoring::kHalf:
      return "half";
    case Scoring::kStride:
      return "stride";
  }
  return "";
}

// The evaluation of all modes, window by window.
class Evaluation {
 public:
  explicit Evaluation(const EvaluateOptions& options)
      : options_(options), pool_(std::max(options.threads, 1)) {}

  absl::StatusOr<nlohmann::ordered_json> Run();

 private:
  absl::Status Prepare();
  absl::StatusOr<nlohmann::ordered_json> RunContext(int context, ResumeFile* resume);
  absl::Status RunWindow(const EvalWindow& window, std::vector<Score>* scores);
  // Scores the targets among tokens [begin + 1, begin + count] of the window.
  // `logits` are the mode's; base_logits_ and base_stats_ hold the base's.
  void ScoreRows(const EvalWindow& window, int begin, int count, int first_row, const float* logits,
                 Score* score);
  void SummarizeBase(int count, int first_row);
  absl::Status DumpWindow(const EvalWindow& window);
  // Tokens from `begin` that go in together: never across a memory mark or into the tail.
  int PieceLength(const EvalWindow& window, int begin) const;
  int MaxPiece() const { return std::min(options_.prefill_chunk, kMemoryStep); }
  nlohmann::ordered_json Head() const;
  absl::Span<const int32_t> Tokens(const EvalWindow& window) const {
    return absl::MakeConstSpan(tokens_).subspan(static_cast<size_t>(window.begin),
                                                static_cast<size_t>(window.length));
  }
  const ModelConfig& config() const { return base_->model().config(); }
  const Lane& lane(size_t i) const { return lanes_[i] == nullptr ? *base_ : *lanes_[i]; }

  const EvaluateOptions& options_;
  ThreadPool pool_;
  std::vector<int32_t> tokens_;
  std::vector<EvalMode> modes_;
  std::unique_ptr<Lane> base_;
  // Of modes_, then the noise if wanted; null: what base_ computes.
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<float> base_logits_, lane_logits_;  // [piece, vocab]
  std::vector<RowStats> base_stats_;              // [piece]
  std::vector<RowScore> rows_;                    // [piece]
  std::unique_ptr<Progress> progress_;
};

absl::Status Evaluation::Prepare() {
  WINNOW_ASSIGN_OR_RETURN(modes_, ParseEvalModes(options_.modes, options_.thresholds));
  if (options_.contexts.empty()) return absl::InvalidArgumentError("no context given");
  const int longest = *std::max_element(options_.contexts.begin(), options_.contexts.end());
  WINNOW_ASSIGN_OR_RETURN(tokens_, ReadTokens(options_.model_dir, options_.text_file));
  int64_t work = 0;
  for (const int context : options_.contexts) {
    WINNOW_ASSIGN_OR_RETURN(const std::vector<EvalWindow> windows,
                            PlanWindows(static_cast<int64_t>(tokens_.size()), context,
                                        options_.windows, options_.scoring, options_.stride));
    work += int64_t{context} * static_cast<int64_t>(windows.size());
  }
  progress_ = std::make_unique<Progress>(options_.progress, "tokens", work);

  const LaneOptions lane{.model_dir = options_.model_dir,
                         .adapter_dir = options_.adapter_dir,
                         .context = longest,
                         .prefill_chunk = MaxPiece(),
                         .threads = options_.threads};
  LaneModels models(options_.model_dir, options_.adapter_dir);
  const auto create = [&](const EvalMode& mode,
                          ActivationType activations) -> absl::StatusOr<std::unique_ptr<Lane>> {
    WINNOW_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, models.Get(mode.kv_mode));
    return Lane::Create(lane, mode, activations, std::move(model));
  };
  WINNOW_ASSIGN_OR_RETURN(
      base_, create({.name = kBaseMode, .kv_mode = kBaseMode}, ActivationType::kFloat32));
  const ActivationType activations =
      options_.bf16_activations ? ActivationType::kBf16 : ActivationType::kFloat32;
  for (const EvalMode& mode : modes_) {
    lanes_.emplace_back();
    if (mode.kv_mode != kBaseMode || options_.bf16_activations) {
      WINNOW_ASSIGN_OR_RETURN(lanes_.back(), create(mode, activations));
    }
  }
  if (options_.noise) {
    lanes_.emplace_back();
    WINNOW_ASSIGN_OR_RETURN(lanes_.back(),
                            create({.name = kNoise, .kv_mode = kBaseMode}, ActivationType::kBf16));
  }
  const size_t rows = static_cast<size_t>(std::min(MaxPiece(), longest));
  base_logits_.resize(rows * static_cast<size_t>(config().vocab_size));
  lane_logits_.resize(base_logits_.size());
  base_stats_.resize(rows);
  rows_.resize(rows);
  return absl::OkStatus();
}

int Evaluation::PieceLength(const EvalWindow& window, int begin) const {
  const int tail = std::max(window.length - options_.decode_tail, 0);
  if (begin >= tail) return 1;
  const int mark = (begin / kMemoryStep + 1) * kMemoryStep;
  return std::min({begin + MaxPiece(), mark, tail}) - begin;
}

void Evaluation::SummarizeBase(int count, int first_row) {
  const size_t vocab = static_cast<size_t>(config().vocab_size);
  pool_.ParallelFor(count - first_row, 1, [&](int from, int to) {
    for (int i = first_row + from; i < first_row + to; ++i) {
      const size_t row = static_cast<size_t>(i);
      base_stats_[row] = Summarize({base_logits_.data() + row * vocab, vocab});
    }
  });
}

void Evaluation::ScoreRows(const EvalWindow& window, int begin, int count, int first_row,
                           const float* logits, Score* score) {
  const size_t vocab = static_cast<size_t>(config().vocab_size);
  const absl::Span<const int32_t> tokens = Tokens(window);
  pool_.ParallelFor(count - first_row, 1, [&](int from, int to) {
    for (int i = first_row + from; i < first_row + to; ++i) {
      const size_t row = static_cast<size_t>(i);
      rows_[row] =
          ScoreRow({base_logits_.data() + row * vocab, vocab}, base_stats_[row],
                   {logits + row * vocab, vocab}, tokens[static_cast<size_t>(begin + i + 1)]);
    }
  });
  for (int i = first_row; i < count; ++i) {
    score->AddRow(begin + i + 1, rows_[static_cast<size_t>(i)]);
  }
}

absl::Status Evaluation::RunWindow(const EvalWindow& window, std::vector<Score>* scores) {
  const absl::Span<const int32_t> tokens = Tokens(window);
  WINNOW_RETURN_IF_ERROR(base_->Begin());
  for (const std::unique_ptr<Lane>& lane : lanes_) {
    if (lane != nullptr) WINNOW_RETURN_IF_ERROR(lane->Begin());
  }
  for (int begin = 0, count = 0; begin < window.length; begin += count) {
    count = PieceLength(window, begin);
    const int end = begin + count;
    const absl::Span<const int32_t> piece =
        tokens.subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
    // Row i predicts token begin + i + 1.
    const int first_row = std::max(window.first_target - 1 - begin, 0);
    const int num_rows = std::min(end, window.length - 1) - begin;
    const bool wanted = first_row < num_rows;
    WINNOW_RETURN_IF_ERROR(base_->Run(piece, wanted ? base_logits_.data() : nullptr));
    if (wanted) SummarizeBase(num_rows, first_row);
    for (size_t i = 0; i < lanes_.size(); ++i) {
      Score* score = &(*scores)[i];
      float* logits = lanes_[i] == nullptr ? base_logits_.data() : lane_logits_.data();
      if (lanes_[i] != nullptr) {
        WINNOW_RETURN_IF_ERROR(lanes_[i]->Run(piece, wanted ? logits : nullptr));
      }
      if (wanted) ScoreRows(window, begin, num_rows, first_row, logits, score);
      if (end % kMemoryStep == 0 || end == window.length) {
        score->AddMemory(end, lane(i).cache(), base_->cache());
      }
    }
    progress_->Advance(count);
  }
  for (size_t i = 0; i < lanes_.size(); ++i) {
    (*scores)[i].AddWindow(config().num_layers * config().num_kv_heads, config().num_kv_heads,
                           lane(i).cache(), base_->cache());
  }
  return absl::OkStatus();
}

absl::StatusOr<nlohmann::ordered_json> Evaluation::RunContext(int context, ResumeFile* resume) {
  WINNOW_ASSIGN_OR_RETURN(const std::vector<EvalWindow> windows,
                          PlanWindows(static_cast<int64_t>(tokens_.size()), context,
                                      options_.windows, options_.scoring, options_.stride));
  std::vector<Score> scores = resume->Scores(context, lanes_.size());
  const size_t done = static_cast<size_t>(scores.front().windows);
  if (done > 0) {
    progress_->Skip(static_cast<int64_t>(done) * context);
    progress_->Line(absl::StrFormat("context %d: %d of %d windows were done before", context, done,
                                    windows.size()));
  }
  for (size_t i = done; i < windows.size(); ++i) {
    WINNOW_RETURN_IF_ERROR(RunWindow(windows[i], &scores));
    WINNOW_RETURN_IF_ERROR(resume->Save(context, scores));
    std::string line =
        absl::StrFormat("context %d: window %d of %d", context, i + 1, windows.size());
    for (size_t j = 0; j < modes_.size(); ++j) {
      const PositionSums& sums = scores[j].total;
      absl::StrAppendFormat(&line, ", %s kld %.5f", modes_[j].name,
                            sums.kld / static_cast<double>(sums.positions));
    }
    progress_->Line(line);
  }
  nlohmann::ordered_json result;
  for (size_t i = 0; i < modes_.size(); ++i) {
    nlohmann::ordered_json row = scores[i].ToJson(config().num_kv_heads);
    if (modes_[i].dms) row["dms_threshold"] = modes_[i].threshold;
    result["modes"][modes_[i].name] = std::move(row);
  }
  if (options_.noise) result["noise"] = scores.back().total.ToJson();
  return result;
}

absl::Status Evaluation::DumpWindow(const EvalWindow& window) {
  Lane* lane = lanes_.front() != nullptr ? lanes_.front().get() : base_.get();
  const absl::Span<const int32_t> tokens = Tokens(window);
  const size_t layers = static_cast<size_t>(config().num_layers);
  const size_t heads = static_cast<size_t>(config().num_kv_heads);
  const size_t vocab = static_cast<size_t>(config().vocab_size);
  Dump dump{.mode = modes_.front().kv_mode,
            .threshold = modes_.front().threshold,
            .tokens = {tokens.begin(), tokens.end()},
            .num_layers = config().num_layers,
            .num_kv_heads = config().num_kv_heads,
            .vocab = config().vocab_size};
  const bool dms = modes_.front().dms;
  if (dms) dump.decisions.resize(layers * tokens.size() * heads);
  WINNOW_RETURN_IF_ERROR(lane->Begin());
  std::vector<uint8_t> piece_decisions;
  for (int begin = 0, count = 0; begin < window.length; begin += count) {
    count = PieceLength(window, begin);
    const size_t n = static_cast<size_t>(count);
    if (dms) piece_decisions.assign(layers * n * heads, 0);
    WINNOW_RETURN_IF_ERROR(lane->Run(tokens.subspan(static_cast<size_t>(begin), n),
                                     lane_logits_.data(), dms ? piece_decisions.data() : nullptr));
    for (size_t layer = 0; dms && layer < layers; ++layer) {
      std::copy_n(
          piece_decisions.begin() + static_cast<ptrdiff_t>(layer * n * heads), n * heads,
          dump.decisions.begin() +
              static_cast<ptrdiff_t>((layer * tokens.size() + static_cast<size_t>(begin)) * heads));
    }
    const int first = std::max(window.length - kDumpLogits - begin, 0);
    if (first < count) {
      dump.logits.insert(dump.logits.end(),
                         lane_logits_.begin() + static_cast<ptrdiff_t>(first * vocab),
                         lane_logits_.begin() + static_cast<ptrdiff_t>(n * vocab));
    }
  }
  return WriteDump(options_.dump_file, dump, lane->model());
}

nlohmann::ordered_json Evaluation::Head() const {
  nlohmann::ordered_json head;
  head["model"] = options_.model_dir;
  head["adapter"] = options_.adapter_dir;
  head["text"] = options_.text_file;
  head["windows"] = options_.windows;
  head["scoring"] = ScoringName(options_.scoring);
  if (options_.scoring == Scoring::kStride) head["stride"] = options_.stride;
  head["decode_tail"] = options_.decode_tail;
  head["activations"] = options_.bf16_activations ? "bf16" : "float32";
  return head;
}

absl::StatusOr<nlohmann::ordered_json> Evaluation::Run() {
  WINNOW_RETURN_IF_ERROR(Prepare());
  nlohmann::ordered_json result = Head();
  // What must be the same for an interrupted run to go on.
  nlohmann::json key = result;
  key["contexts"] = options_.contexts;
  key["tokens"] = TokensDigest(tokens_);
  key["lanes"] = nlohmann::json::array();
  for (size_t i = 0; i < lanes_.size(); ++i) {
    key["lanes"].push_back({i < modes_.size() ? modes_[i].name : kNoise, lane(i).Describe()});
  }
  WINNOW_ASSIGN_OR_RETURN(ResumeFile resume, ResumeFile::Open(options_.resume_file, key));
  for (const int context : options_.contexts) {
    WINNOW_ASSIGN_OR_RETURN(nlohmann::ordered_json part, RunContext(context, &resume));
    if (options_.contexts.size() == 1) {
      result["context"] = context;
      result.update(part);
    } else {
      part["context"] = context;
      result["contexts"].push_back(std::move(part));
    }
  }
  if (!options_.dump_file.empty()) {
    WINNOW_RETURN_IF_ERROR(DumpWindow({.begin = 0, .length = options_.contexts.front()}));
  }
  return result;
}

}  // namespace

absl::StatusOr<nlohmann::ordered_json> Evaluate(const EvaluateOptions& options) {
  return Evaluation(options).Run();
}

}  // namespace winnow::cli
