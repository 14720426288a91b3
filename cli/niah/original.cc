#include "cli/niah/original.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/eval/modes.h"
#include "common/base/status_macros.h"

namespace winnow::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kSystem[] =
    "Answer the question based only on the provided context. Be brief and precise.";
constexpr char kNeedle[] = "The capital of Freedonia is Silverton.";
constexpr char kQuestion[] = "What is the capital of Freedonia?";
constexpr int kWarmUpTokens = 512, kWarmUpNew = 32;
// Cutting a text by tokens and encoding it anew may change their number a little.
constexpr int kMargin = 8;

PromptParts Parts(const std::string& context) {
  return {.system = kSystem,
          .content = absl::StrCat("Context:\n", context, "\n\nQuestion: ", kQuestion)};
}

// Lets VmHWM start anew. Where that is not allowed it keeps the process's maximum.
void ResetPeakRss() { std::ofstream("/proc/self/clear_refs") << "5"; }

uint64_t PeakRssBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (!absl::StartsWith(line, "VmHWM:")) continue;
    uint64_t kib = 0;
    std::istringstream(line.substr(6)) >> kib;
    return kib * 1024;
  }
  return 0;
}

struct Cell {
  PromptForm form;
  int length = 0;
  int max_new_tokens = 0;
  std::vector<int32_t> prompt;
};

int NewTokens(const OriginalOptions& options, PromptForm form) {
  if (options.max_new_tokens > 0) return options.max_new_tokens;
  return form == PromptForm::kThink ? 512 : 128;
}

absl::StatusOr<Cell> MakeCell(const OriginalOptions& options, const PromptMaker& prompts,
                              absl::Span<const Sentence> filler, PromptForm form, int length) {
  Cell cell{.form = form, .length = length, .max_new_tokens = NewTokens(options, form)};
  WINNOW_ASSIGN_OR_RETURN(const auto frame, prompts.Encode(form, Parts("")));
  const int room = prompts.config().max_position_embeddings - static_cast<int>(frame.size()) -
                   cell.max_new_tokens - kMargin;
  if (length > room && options.progress) {
    std::fprintf(stderr, "length %d: the text is cut to %d tokens, for the model ends at %d\n",
                 length, std::max(room, 0), prompts.config().max_position_embeddings);
  }
  absl::StatusOr<std::string> context =
      OriginalContext(prompts.tokenizer(), filler, std::min(length, room));
  if (!context.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--lengths: ", length, ": ", std::string(context.status().message())));
  }
  WINNOW_ASSIGN_OR_RETURN(cell.prompt, prompts.Encode(form, Parts(*context)));
  return cell;
}

absl::StatusOr<Json> RunCell(const OriginalOptions& options, const std::string& mode,
                             const Cell& cell, NiahRunner* runner) {
  double new_tokens = 0, ttft = 0, elapsed = 0;
  int correct = 0;
  KvUsage kv;
  Json answers = Json::array();
  ResetPeakRss();
  for (int i = 0; i < options.iterations; ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    WINNOW_ASSIGN_OR_RETURN(const NiahOutput output, runner->Run(cell.prompt, cell.max_new_tokens,
                                                                 {.temperature = 0.1f}, seed));
    new_tokens += static_cast<double>(output.ids.size());
    ttft += absl::ToDoubleSeconds(output.first_token);
    elapsed += absl::ToDoubleSeconds(output.total);
    correct += OriginalCorrect(output.text) ? 1 : 0;
    const uint64_t peak = std::max(kv.peak_bytes, output.kv.peak_bytes);
    const uint64_t dense = std::max(kv.dense_bf16_bytes, output.kv.dense_bf16_bytes);
    kv = output.kv;
    kv.peak_bytes = peak;
    kv.dense_bf16_bytes = dense;
    answers.push_back(output.text);
    if (options.progress) {
      std::fprintf(stderr, "%s %s %d: %d/%d, first token after %.2f s, %zu tokens\n", mode.c_str(),
                   FormName(cell.form).c_str(), cell.length, i + 1, options.iterations,
                   absl::ToDoubleSeconds(output.first_token), output.ids.size());
    }
  }
  const double n = options.iterations;
  new_tokens /= n, ttft /= n, elapsed /= n;
  return Json{
      {"mode", mode},
      {"form", FormName(cell.form)},
      {"length", cell.length},
      {"prompt_tokens", cell.prompt.size()},
      {"new_tokens", new_tokens},
      {"ttft_s", ttft},
      {"elapsed_s", elapsed},
      {"tokens_per_s", new_tokens / elapsed},
      {"decode_tokens_per_s", elapsed > ttft ? Json(new_tokens / (elapsed - ttft)) : Json()},
      {"kv_bytes", kv.peak_bytes},
      {"kv_bytes_dense_bf16", kv.dense_bf16_bytes},
      {"rss_bytes", PeakRssBytes()},
      {"live_tokens", kv.live_tokens},
      {"logical_tokens", kv.logical_tokens},
      {"live_ratio", static_cast<double>(kv.logical_tokens) /
                         static_cast<double>(std::max<uint64_t>(kv.live_tokens, 1))},
      {"correct", correct > 0},
      {"correct_of", correct},
      {"iterations", options.iterations},
      {"answers", std::move(answers)}};
}

}  // namespace

absl::StatusOr<std::string> OriginalContext(const Tokenizer& tokenizer,
                                            absl::Span<const Sentence> filler, int tokens) {
  std::string text;
  bool planted = false;
  int size = 0;  // about, in tokens
  for (size_t i = 0; size < tokens; ++i) {
    const Sentence& sentence = filler[i % filler.size()];
    const bool paragraph = sentence.starts_paragraph || i == 0;
    // At the first paragraph behind the middle, if one begins soon.
    if (!planted && (2 * size >= tokens) && (paragraph || 5 * size >= 3 * tokens)) {
      absl::StrAppend(&text, text.empty() ? "" : "\n\n", kNeedle, "\n\n", sentence.text);
      planted = true;
    } else {
      absl::StrAppend(&text, text.empty() ? "" : paragraph ? "\n\n" : " ", sentence.text);
    }
    WINNOW_ASSIGN_OR_RETURN(const auto ids, tokenizer.Encode(sentence.text, false));
    size += static_cast<int>(ids.size());
  }
  WINNOW_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer.Encode(text, false));
  if (static_cast<int>(ids.size()) > tokens) ids.resize(static_cast<size_t>(std::max(tokens, 0)));
  WINNOW_ASSIGN_OR_RETURN(text, tokenizer.Decode(ids, /*skip_special=*/false));
  if (!absl::StrContains(text, kNeedle)) {
    return absl::InvalidArgumentError(
        absl::StrCat(tokens, " tokens are too few for a needle between sentences"));
  }
  return text;
}

bool OriginalCorrect(const std::string& output) {
  constexpr std::string_view kEndOfThoughts = "</think>";
  const size_t end = output.rfind(kEndOfThoughts);
  const std::string answer =
      absl::AsciiStrToLower(end == output.npos ? output : output.substr(end));
  return absl::StrContains(answer, "silverton");
}

absl::StatusOr<Json> RunOriginal(const OriginalOptions& options, const PromptMaker& prompts,
                                 absl::Span<const Sentence> filler) {
  WINNOW_ASSIGN_OR_RETURN(const std::vector<std::string> modes, BaseAndModes(options.modes));
  if (options.progress && prompts.forms().size() == 1) {
    std::fprintf(stderr,
                 "the model's template does not know enable_thinking: one form (%s) instead of "
                 "think and no_think\n",
                 FormName(prompts.short_form()).c_str());
  }
  std::vector<Cell> cells;
  int max_len = 2;
  for (const PromptForm form : prompts.forms()) {
    for (const int length : options.lengths) {
      WINNOW_ASSIGN_OR_RETURN(Cell cell, MakeCell(options, prompts, filler, form, length));
      max_len = std::max(max_len, static_cast<int>(cell.prompt.size()) + cell.max_new_tokens);
      cells.push_back(std::move(cell));
    }
  }
  if (cells.empty()) return absl::InvalidArgumentError("--lengths is empty");
  Json rows = Json::array();
  for (const std::string& mode : modes) {
    WINNOW_ASSIGN_OR_RETURN(std::unique_ptr<NiahRunner> runner,
                            NiahRunner::Create(options.engine, mode, max_len));
    // The longest prompt's beginning serves for the warm-up.
    const auto longest = std::max_element(
        cells.begin(), cells.end(),
        [](const Cell& a, const Cell& b) { return a.prompt.size() < b.prompt.size(); });
    std::vector<int32_t> warm_up = longest->prompt;
    warm_up.resize(std::min(warm_up.size(), static_cast<size_t>(kWarmUpTokens)));
    WINNOW_RETURN_IF_ERROR(
        runner->Run(warm_up, std::min(kWarmUpNew, longest->max_new_tokens), {}, options.seed)
            .status());
    for (const Cell& cell : cells) {
      WINNOW_ASSIGN_OR_RETURN(Json row, RunCell(options, mode, cell, runner.get()));
      rows.push_back(std::move(row));
    }
  }
  return Json{{"rows", std::move(rows)}};
}

std::string OriginalTable(const Json& rows) {
  std::string table =
      absl::StrFormat("%-11s %-8s %6s %7s %9s %8s %8s %9s %9s %7s %s\n", "mode", "form", "length",
                      "prompt", "TTFT s", "tok/s", "decode", "KV MB", "RSS MB", "live", "correct");
  for (const Json& row : rows) {
    const Json& decode = row["decode_tokens_per_s"];
    absl::StrAppendFormat(
        &table, "%-11s %-8s %6d %7d %9.3f %8.1f %8.1f %9.2f %9.1f %6.2fx %s (%d/%d)\n",
        row["mode"].get<std::string>(), row["form"].get<std::string>(), row["length"].get<int>(),
        row["prompt_tokens"].get<int>(), row["ttft_s"].get<double>(),
        row["tokens_per_s"].get<double>(), decode.is_null() ? 0.0 : decode.get<double>(),
        row["kv_bytes"].get<double>() / 1e6, row["rss_bytes"].get<double>() / 1e6,
        row["live_ratio"].get<double>(), row["correct"].get<bool>() ? "yes" : "no",
        row["correct_of"].get<int>(), row["iterations"].get<int>());
  }
  return table;
}

}  // namespace winnow::cli
