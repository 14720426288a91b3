#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "cli/commands.h"
#include "cli/generator.h"
#include "cli/inputs.h"
#include "cli/output.h"
#include "cli/results.h"
#include "common/base/status_macros.h"
#include "common/config/config.h"
#include "common/kv/kv_mode.h"
#include "common/rpc/grpc_status.h"

namespace winnow::cli {
namespace {

struct Options {
  std::string server;
  bool local = false;
  std::string model = "default";
  std::string adapter = "default";
  std::optional<float> dms_threshold;
  LocalOptions engine;
  std::string prompt;
  std::string prompts;
  bool chat = false;
  bool raw = false;
  std::optional<int> max_tokens;
  std::optional<float> temperature;
  std::optional<int> top_k;
  std::optional<float> top_p;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  int concurrency = 1;
  std::string json;
  bool stats = false;
  absl::Duration timeout = absl::Seconds(600);
};

config::FlagSet Flags(Options* o) {
  config::FlagSet flags("winnow generate (--server HOST:PORT | --local) --prompt TEXT [flags]",
                        "Completes prompts and streams the text to standard output.");
  flags.AddHostPort("server", &o->server, "HOST:PORT of a router.");
  flags.AddBool("local", &o->local, "Run the model in this process instead.");
  flags.AddString("prompt", &o->prompt, "The prompt; - reads it from standard input.");
  flags.AddString("prompts", &o->prompts,
                  "File with a JSON object a line: {\"prompt\": TEXT, \"chat\": true|false} or "
                  "{\"token_ids\": [...]}.");
  flags.AddBool("chat", &o->chat,
                "Prompts are a user's chat message. Without --chat or --raw: if the model's chat "
                "template is known.");
  flags.AddBool("raw", &o->raw, "Prompts are raw text to be continued.");
  constexpr int kMaxInt = 1 << 30;
  flags.AddOptionalInt("max-tokens", &o->max_tokens, 1, kMaxInt,
                       "Most tokens to generate. Unset: up to the model's length.");
  flags.AddOptionalFloat("temperature", &o->temperature, 0, 100,
                         "0 is greedy. Unset, as the next two: what the model's files say, greedy "
                         "where they are silent.");
  flags.AddOptionalInt("top-k", &o->top_k, 0, kMaxInt, "Sample from the k likeliest; 0: all.");
  flags.AddOptionalFloat("top-p", &o->top_p, 0, 1,
                         "Sample from the likeliest tokens that together reach this probability.");
  flags.AddOptionalUint64("seed", &o->seed, "Same seed, same tokens. Unset: a random one.");
  flags.AddRepeated("stop", &o->stop, "Text that ends the completion; may be repeated.");
  flags.AddBool("ignore-eos", &o->ignore_eos, "Do not end at the model's end tokens.");
  flags.AddInt("concurrency", &o->concurrency, 1, 4096, "Requests of --prompts at once.");
  flags.AddString("json", &o->json,
                  "File to overwrite with a JSON object a line for each input, in input order.");
  flags.AddBool("stats", &o->stats, "Print a table of times and bytes after the text.");
  flags.AddDuration("timeout", &o->timeout, "Deadline of each request.");
  flags.AddString("model", &o->model, "With --local: model directory, or default.");
  flags.AddString("adapter", &o->adapter, absl::StrCat("With --local. ", config::kAdapterHelp));
  flags.AddChoice("kv-mode", &o->engine.kv_mode, KvModeNames(),
                  "With --local: how keys and values are kept.");
  flags.AddChoice("kv-format", &o->engine.kv_format, KvFormatNames(),
                  "With --local: takes the place of the format in --kv-mode.");
  flags.AddOptionalFloat("dms-threshold", &o->dms_threshold, -1e6f, 1e6f,
                         absl::StrCat("With --local, in ", config::kThresholdHelp));
  flags.AddBytes("kv-budget", &o->engine.kv_budget_bytes,
                 "With --local: memory of the KV cache, e.g. 512MiB.");
  flags.AddInt("prefill-chunk", &o->engine.prefill_chunk, 1, 65536,
               "With --local: tokens of one prefill step.");
  flags.AddInt("max-num-seqs", &o->engine.max_num_seqs, 1, 4096,
               "With --local: most sequences in one batch.");
  flags.AddInt("max-model-len", &o->engine.max_model_len, 0, kMaxInt,
               "With --local: most tokens of prompt and completion; 0: the model's.");
  flags.AddInt("threads", &o->engine.threads, 0, 1024,
               "With --local: threads that compute; 0: one a core.");
  return flags;
}

int UsageError(const std::string& message) {
  std::fprintf(stderr, "winnow: %s (see winnow generate --help)\n", message.c_str());
  return 2;
}

// What is wrong with the combination of flags, or "".
std::string CheckOptions(const Options& o, const config::FlagSet& flags) {
  if (o.local == !o.server.empty()) return "needs either --server HOST:PORT or --local";
  if (flags.IsSet("prompt") == flags.IsSet("prompts")) return "needs either --prompt or --prompts";
  if (o.chat && o.raw) return "--chat and --raw exclude each other";
  if (o.top_p.has_value() && *o.top_p <= 0) return "--top-p=\"0\" is outside (0, 1]";
  return "";
}

absl::StatusOr<std::vector<Input>> Inputs(const Options& o) {
  if (!o.prompts.empty()) {
    std::ifstream file(o.prompts);
    if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", o.prompts));
    return ReadInputs(file, o.prompts);
  }
  Input input;
  input.prompt = o.prompt;
  if (o.prompt == "-") {
    input.prompt.assign(std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>());
  }
  return std::vector<Input>{input};
}

absl::StatusOr<std::unique_ptr<Generator>> MakeGenerator(const Options& o) {
  if (!o.local) return NewServerGenerator(o.server);
  LocalOptions local = o.engine;
  local.model_dir = config::ResolveModelDir(o.model);
  local.dms_threshold = o.dms_threshold.value_or(0);
  local.adapter_dir = config::ResolveAdapterDir(o.model, o.adapter);
  return NewLocalGenerator(local);
}

v1::GenerateRequest MakeRequest(const Options& o, const Input& input, bool model_has_chat) {
  v1::GenerateRequest request;
  SetInput(input, o.chat || (!o.raw && model_has_chat), &request);
  request.set_return_prompt_token_ids(true);
  v1::SamplingParams* s = request.mutable_sampling();
  if (o.max_tokens) s->set_max_tokens(*o.max_tokens);
  if (o.temperature) s->set_temperature(*o.temperature);
  if (o.top_k) s->set_top_k(*o.top_k);
  if (o.top_p) s->set_top_p(*o.top_p);
  if (o.seed) s->set_seed(*o.seed);
  for (const std::string& stop : o.stop) s->add_stop(stop);
  if (o.ignore_eos) s->set_ignore_eos(true);
  return request;
}

// Warns if prompt and max_tokens pass the context, and asks for what fits.
absl::Status FitContext(Generator* generator, const v1::GetModelInfoResponse& info, int line,
                        v1::GenerateRequest* request) {
  if (!request->sampling().has_max_tokens()) return absl::OkStatus();
  WINNOW_ASSIGN_OR_RETURN(const int prompt, generator->CountPromptTokens(*request));
  const int left = info.max_model_len() - prompt;
  if (left < 1 || request->sampling().max_tokens() <= left) return absl::OkStatus();
  const std::string where = line > 0 ? absl::StrCat("line ", line, ": ") : "";
  std::fprintf(stderr,
               "winnow: warning: %sprompt (%d) and --max-tokens (%d) pass the context of %d "
               "tokens; generating at most %d\n",
               where.c_str(), prompt, request->sampling().max_tokens(), info.max_model_len(), left);
  request->mutable_sampling()->set_max_tokens(left);
  return absl::OkStatus();
}

// Runs all inputs, `concurrency` at a time. One input alone streams its text to standard
// output.
std::vector<Result> RunAll(const Options& o, Generator* generator,
                           const v1::GetModelInfoResponse& info, const std::vector<Input>& inputs) {
  std::vector<Result> results(inputs.size());
  const bool stream = o.prompts.empty();
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t i = next++; i < inputs.size(); i = next++) {
      Result& result = results[i];
      v1::GenerateRequest request = MakeRequest(o, inputs[i], info.chat());
      result.status = FitContext(generator, info, inputs[i].line, &request);
      if (!result.status.ok()) continue;
      const absl::Time start = absl::Now();
      result.status =
          generator->Generate(request, o.timeout, [&](const v1::GenerateResponse& response) {
            result.Add(response, absl::Now() - start);
            if (!stream) return;
            std::fwrite(response.text().data(), 1, response.text().size(), stdout);
            std::fflush(stdout);
          });
    }
  };
  std::vector<std::thread> threads;
  const size_t count = std::min(inputs.size(), static_cast<size_t>(o.concurrency));
  for (size_t i = 1; i < count; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  return results;
}

}  // namespace

int RunGenerate(int argc, char** argv, int first) {
  Options options;
  config::FlagSet flags = Flags(&options);
  if (auto code = config::ParseOrExitCode(&flags, "winnow", argc, argv, first)) return *code;
  if (const std::string wrong = CheckOptions(options, flags); !wrong.empty()) {
    return UsageError(wrong);
  }
  absl::StatusOr<std::vector<Input>> inputs = Inputs(options);
  if (!inputs.ok()) return PrintError(inputs.status());
  absl::StatusOr<std::unique_ptr<Generator>> generator = MakeGenerator(options);
  if (!generator.ok()) return PrintError(generator.status());
  absl::StatusOr<v1::GetModelInfoResponse> info = (*generator)->GetModelInfo();
  if (!info.ok()) return PrintError(info.status());

  const absl::Time start = absl::Now();
  const std::vector<Result> results = RunAll(options, generator->get(), *info, *inputs);
  const absl::Duration wall_time = absl::Now() - start;
  const bool one = options.prompts.empty();
  for (const Result& result : results) {
    if (one) {
      if (!result.token_ids.empty()) std::fputs("\n", stdout);
    } else if (options.json.empty()) {
      std::fprintf(stdout, "%s\n", result.text.c_str());
    }
  }
  if (!options.json.empty()) {
    std::string lines;
    for (const Result& result : results) absl::StrAppend(&lines, JsonLine(result), "\n");
    if (absl::Status status = WriteFile(options.json, lines); !status.ok()) {
      return PrintError(status);
    }
  }
  if (options.stats) std::fprintf(stdout, "\n%s", StatsTable(results, wall_time).c_str());
  std::fflush(stdout);
  for (const Result& result : results) {
    if (!result.status.ok()) return PrintError(result.status);
  }
  return 0;
}

}  // namespace winnow::cli
