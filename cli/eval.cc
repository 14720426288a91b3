#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "cli/commands.h"
#include "cli/eval/evaluate.h"
#include "cli/eval/short_protocol.h"
#include "cli/output.h"
#include "common/base/log.h"
#include "common/base/status_macros.h"
#include "common/config/config.h"
#include "common/config/flags.h"

namespace winnow::cli {
namespace {

struct EvalFlags {
  EvaluateOptions options;
  std::string model = "default", adapter = "default", modes = "dense-fp8", thresholds = "0";
  std::string contexts = "2048", scoring = "all", protocol = "windows", json;
  int threads = 0;
  bool resume = true;
};

config::FlagSet MakeFlags(EvalFlags* f) {
  EvaluateOptions& o = f->options;
  config::FlagSet flags("winnow eval --text FILE [flags]",
                        "Scores a text in several KV cache modes against dense-bf16: perplexity, "
                        "KL divergence, evicted share, live tokens, bytes.");
  flags.AddString("model", &f->model, "model directory in Hugging Face layout, or 'default'");
  flags.AddString("adapter", &f->adapter, config::kAdapterHelp);
  flags.AddString("text", &o.text_file, "UTF-8 text file");
  flags.AddString("modes", &f->modes,
                  "comma list of dense- or dms- and a format (bf16, fp8, int8, int8h, k8v8, "
                  "best), a dms- mode also at a threshold of its own: dms-fp8@-2; each is "
                  "compared with dense-bf16");
  flags.AddString("dms-threshold", &f->thresholds,
                  "comma list; a token is evicted iff its DMS logit is above it: higher keeps "
                  "more, 0 is as trained; several give MODE@THRESHOLD");
  flags.AddString("context", &f->contexts, "tokens of a window; a comma list runs each length");
  flags.AddInt("windows", &o.windows, 1, 1 << 20, "windows, from the start of the text");
  flags.AddChoice("scoring", &f->scoring, {"all", "half", "stride"},
                  "all: windows one after the other, every prediction; half: the second half of "
                  "each (llama.cpp's perplexity); stride: windows --stride apart, each token once "
                  "(Hugging Face's)");
  flags.AddInt("stride", &o.stride, 0, 1 << 20, "tokens; with --scoring stride");
  flags.AddInt("decode-tail", &o.decode_tail, 0, 1 << 20,
               "last tokens of a window that are decoded one by one; changes no figure");
  flags.AddChoice("protocol", &f->protocol, {"windows", "short"},
                  "short: FastDMS' own protocol, 4 prompts of 1024 tokens and 16 greedy tokens, "
                  "teacher-forced and free-running");
  flags.AddInt("prefill-chunk", &o.prefill_chunk, 1, 65536,
               "tokens computed together, 512 at most; changes memory, no figure");
  flags.AddInt("threads", &f->threads, 0, 1024, "CPU threads; 0: one a core");
  flags.AddBool("bf16-activations", &o.bf16_activations,
                "round the activations of the modes to BF16, as serving does; the base keeps "
                "float32");
  flags.AddBool("noise", &o.noise,
                "also measure what BF16 activations alone do to dense-bf16: the noise of serving");
  flags.AddString("json", &f->json, "write the result to this file too");
  flags.AddBool("resume", &f->resume,
                "leave the sums in JSON.partial after each window, and go on from there");
  flags.AddString("dump", &o.dump_file,
                  "write tokens, decisions and last logits of the first window in the first mode "
                  "to this safetensors file");
  return flags;
}

template <typename T, typename Parse>
absl::Status ParseList(std::string_view flag, const std::string& text, Parse parse,
                       std::vector<T>* out) {
  out->clear();
  for (const absl::string_view part : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    if (!parse(part, &out->emplace_back())) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--", absl::string_view(flag.data(), flag.size()), ": \"", part, "\" is no number"));
    }
  }
  return absl::OkStatus();
}

absl::Status Resolve(const config::FlagSet& flags, EvalFlags* f) {
  EvaluateOptions& o = f->options;
  if (f->protocol == "short") {
    for (const char* flag :
         {"context", "windows", "scoring", "stride", "decode-tail", "noise", "resume", "dump"}) {
      if (!flags.IsSet(flag)) continue;
      return absl::InvalidArgumentError(absl::StrCat("--", flag, " is not for --protocol short"));
    }
  }
  if (flags.IsSet("stride") && f->scoring != "stride") {
    return absl::InvalidArgumentError("--stride is for --scoring stride");
  }
  if (o.text_file.empty()) return absl::InvalidArgumentError("--text is missing");
  o.model_dir = config::ResolveModelDir(f->model);
  o.adapter_dir = config::ResolveAdapterDir(f->model, f->adapter);
  o.modes = absl::StrSplit(f->modes, ',', absl::SkipEmpty());
  WINNOW_RETURN_IF_ERROR(ParseList(
      "context", f->contexts,
      [](absl::string_view text, int* out) { return absl::SimpleAtoi(text, out); }, &o.contexts));
  WINNOW_RETURN_IF_ERROR(ParseList(
      "dms-threshold", f->thresholds,
      [](absl::string_view text, float* out) { return absl::SimpleAtof(text, out); },
      &o.thresholds));
  if (f->scoring == "half") o.scoring = Scoring::kHalf;
  if (f->scoring == "stride") o.scoring = Scoring::kStride;
  o.threads = f->threads > 0 ? f->threads
                             : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (f->resume && !f->json.empty()) o.resume_file = f->json + ".partial";
  return absl::OkStatus();
}

void PrintModes(const nlohmann::ordered_json& result) {
  std::printf("context %d, %d windows, %s scored\n", result["context"].get<int>(),
              result["windows"].get<int>(), result["scoring"].get<std::string>().c_str());
  std::printf("%-14s %9s %8s %9s %8s %9s %8s %12s %8s\n", "mode", "ppl", "ppl +%", "kld", "top1 %",
              "evicted %", "live", "KV bytes", "smaller");
  const auto percent = [](const nlohmann::ordered_json& row) {
    return 100 * (row["ppl"].get<double>() / row["ppl_base"].get<double>() - 1);
  };
  for (const auto& [mode, row] : result["modes"].items()) {
    std::printf("%-14s %9.4f %+8.3f %9.6f %8.3f %9.3f %7.2fx %12.0f %7.2fx\n", mode.c_str(),
                row["ppl"].get<double>(), percent(row), row["kld"].get<double>(),
                100 * row["top1"].get<double>(), 100 * row["evict_rate"].get<double>(),
                row["live_ratio"].get<double>(), row["kv_bytes"].get<double>(),
                row["kv_bytes_dense_bf16"].get<double>() / row["kv_bytes"].get<double>());
  }
  if (result.contains("noise")) {
    const nlohmann::ordered_json& noise = result["noise"];
    std::printf("%-14s %9.4f %+8.3f %9.6f %8.3f  (dense-bf16, BF16 activations)\n", "noise",
                noise["ppl"].get<double>(), percent(noise), noise["kld"].get<double>(),
                100 * noise["top1"].get<double>());
  }
}

void PrintShort(const nlohmann::ordered_json& result) {
  std::printf("%-14s %34s   %30s\n", "", "teacher-forced", "free-running");
  std::printf("%-14s %9s %8s %8s %6s   %9s %8s %6s %8s\n", "mode", "kld", "match %", "ppl +%", "n",
              "kld", "match %", "n", "live");
  for (const auto& [mode, row] : result["modes"].items()) {
    const nlohmann::ordered_json& forced = row["teacher_forced"];
    const nlohmann::ordered_json& free = row["free_running"];
    std::printf("%-14s %9.6f %8.2f %+8.3f %3d/%-3d  %9.6f %8.2f %3d/%-3d %6.2fx\n", mode.c_str(),
                forced["kld"].get<double>(), 100 * forced["token_match"].get<double>(),
                100 * (forced["ppl"].get<double>() / forced["ppl_base"].get<double>() - 1),
                forced["scored"].get<int>(), forced["positions"].get<int>(),
                free["kld"].get<double>(), 100 * free["token_match"].get<double>(),
                free["scored"].get<int>(), free["positions"].get<int>(),
                row["live_ratio"].get<double>());
  }
}

}  // namespace

int RunEval(int argc, char** argv, int first) {
  EvalFlags f;
  config::FlagSet flags = MakeFlags(&f);
  if (const auto code = config::ParseOrExitCode(&flags, "winnow eval", argc, argv, first))
    return *code;
  SetLogLevel(LogLevel::kWarning);
  if (const absl::Status status = Resolve(flags, &f); !status.ok()) {
    std::fprintf(stderr, "winnow eval: %s\n", std::string(status.message()).c_str());
    return 2;
  }
  const bool is_short = f.protocol == "short";
  absl::StatusOr<nlohmann::ordered_json> result =
      is_short ? EvaluateShort(f.options) : Evaluate(f.options);
  if (!result.ok()) return PrintError(result.status());
  (*result)["version"] = config::Version();
  if (is_short) {
    PrintShort(*result);
  } else if (!result->contains("contexts")) {
    PrintModes(*result);
  } else {
    for (nlohmann::ordered_json part : (*result)["contexts"]) {
      part.update({{"windows", (*result)["windows"]}, {"scoring", (*result)["scoring"]}});
      PrintModes(part);
    }
  }
  const int code = WriteJson(f.json, *result);
  if (code == 0 && !f.options.resume_file.empty()) std::remove(f.options.resume_file.c_str());
  return code;
}

}  // namespace winnow::cli
