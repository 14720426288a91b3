#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "cli/generator.h"
#include "common/base/bounded_queue.h"
#include "common/base/log.h"
#include "common/base/status_macros.h"
#include "common/engine/runtime.h"
#include "router/request.h"
#include "router/served_model.h"
#include "router/text_stream.h"

namespace winnow::cli {
namespace {

// One Generate() call: where the engine thread leaves tokens and the outcome.
struct Call {
  Request request;

  Mutex mu;
  CondVar changed;
  std::vector<int32_t> tokens ABSL_GUARDED_BY(mu);  // not taken yet
  std::vector<KvUsage> usages ABSL_GUARDED_BY(mu);  // beside `tokens`: the cost up to each
  std::optional<absl::Status> outcome ABSL_GUARDED_BY(mu);
  std::optional<FinishReason> finish_reason ABSL_GUARDED_BY(mu);  // with an OK outcome

  void End(absl::Status status, std::optional<FinishReason> reason) {
    MutexLock lock(&mu);
    outcome = std::move(status);
    finish_reason = reason;
    changed.NotifyAll();
  }
};
using CallPtr = std::shared_ptr<Call>;

struct Command {
  CallPtr call;
  bool cancel = false;  // else: start it
};

// The engine on a thread of its own; callers' threads do the text.
class LocalGenerator final : public Generator, private EventSink {
 public:
  LocalGenerator(const LocalOptions& options, std::unique_ptr<Runtime> runtime,
                 std::unique_ptr<router::ServedModel> model)
      : options_(options),
        runtime_(std::move(runtime)),
        model_(std::move(model)),
        engine_(runtime_->NewEngine(this, /*max_waiting=*/kMaxCalls)),
        commands_(2 * kMaxCalls),
        thread_([this] { Run(); }) {}

  ~LocalGenerator() override {
    stop_ = true;
    commands_.Wake();
    thread_.join();
  }

  absl::StatusOr<v1::GetModelInfoResponse> GetModelInfo() override {
    v1::GetModelInfoResponse info;
    info.set_model(model_->name());
    info.set_architecture(model_->architecture());
    info.set_kv_mode(KvModeName(runtime_->kv_mode()));
    info.set_max_model_len(model_->max_model_len());
    info.set_vocab_size(model_->config().vocab_size);
    for (int32_t id : model_->config().eos_ids) info.add_eos_token_ids(id);
    info.set_chat(model_->chat_template().supported());
    *info.mutable_default_sampling() = model_->DefaultSampling();
    return info;
  }

  absl::StatusOr<int> CountPromptTokens(const v1::GenerateRequest& request) override {
    if (request.has_token_ids()) return request.token_ids().ids_size();
    WINNOW_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                            request.has_chat() ? model_->EncodeChat(request.chat())
                                               : model_->EncodeText(request.text()));
    return static_cast<int>(ids.size());
  }

  absl::Status Generate(const v1::GenerateRequest& request, absl::Duration timeout,
                        const OnResponse& on_response) override {
    const absl::Time deadline = absl::Now() + timeout;
    WINNOW_ASSIGN_OR_RETURN(
        const router::ResolvedRequest resolved,
        router::ResolveRequest(request, *model_, model_->max_model_len(), DrawSeed()));
    auto call = std::make_shared<Call>();
    call->request = ToEngineRequest(resolved);
    if (!commands_.TryPush({.call = call})) {
      return absl::ResourceExhaustedError("too many requests at once");
    }
    router::TextStream text(
        &model_->tokenizer(), resolved.skip_special_tokens, resolved.stop,
        {resolved.sampling.stop_token_ids().begin(), resolved.sampling.stop_token_ids().end()});
    int completion_tokens = 0;
    KvUsage usage;
    for (bool first = true;; first = false) {
      v1::GenerateResponse response;
      if (first) {
        response.mutable_prompt_token_ids()->Add(resolved.prompt_ids.begin(),
                                                 resolved.prompt_ids.end());
      }
      std::vector<KvUsage> usages;
      const std::optional<absl::Status> outcome = Take(call.get(), deadline, &response, &usages);
      if (absl::Now() >= deadline && !outcome.has_value()) {
        commands_.TryPush({.call = call, .cancel = true});
        return absl::DeadlineExceededError(
            absl::StrCat("not done after ", absl::FormatDuration(timeout)));
      }
      // Tokens behind a stop string are not part of the completion.
      int taken = 0;
      for (; taken < response.token_ids_size() && !text.stopped(); ++taken) {
        text.Append(response.token_ids(taken), response.mutable_text());
      }
      response.mutable_token_ids()->Truncate(taken);
      completion_tokens += taken;
      if (taken > 0) usage = usages[static_cast<size_t>(taken) - 1];
      const bool stop_text = text.stop_text().has_value();
      if (outcome.has_value() && !outcome->ok() && !stop_text) return *outcome;
      if (stop_text && !outcome.has_value()) {
        commands_.TryPush({.call = call, .cancel = true});
        WaitForEnd(call.get());
      }
      if (outcome.has_value() || stop_text) {
        text.Finish(response.mutable_text());
        Finish(call.get(), text, static_cast<int>(resolved.prompt_ids.size()), completion_tokens,
               usage, &response);
        on_response(response);
        return absl::OkStatus();
      }
      on_response(response);
    }
  }

 private:
  static constexpr int kMaxCalls = 4096;

  static uint64_t DrawSeed() {
    std::random_device random;
    return (uint64_t{random()} << 32) | random();
  }

  static Request ToEngineRequest(const router::ResolvedRequest& resolved) {
    const v1::ResolvedSampling& sampling = resolved.sampling;
    return {.prompt = resolved.prompt_ids,
            .sampling = {.temperature = sampling.temperature(),
                         .top_k = sampling.top_k(),
                         .top_p = sampling.top_p()},
            .seed = sampling.seed(),
            .max_tokens = sampling.max_tokens(),
            .stop_token_ids = {sampling.stop_token_ids().begin(), sampling.stop_token_ids().end()}};
  }

  // Waits for tokens, the end or the deadline; moves the tokens into `response`.
  static std::optional<absl::Status> Take(Call* call, absl::Time deadline,
                                          v1::GenerateResponse* response,
                                          std::vector<KvUsage>* usages) {
    MutexLock lock(&call->mu);
    while (call->tokens.empty() && !call->outcome.has_value() && absl::Now() < deadline) {
      call->changed.WaitFor(&call->mu, deadline - absl::Now());
    }
    response->mutable_token_ids()->Add(call->tokens.begin(), call->tokens.end());
    call->tokens.clear();
    *usages = std::exchange(call->usages, {});
    return call->outcome;
  }

  static void WaitForEnd(Call* call) {
    MutexLock lock(&call->mu);
    while (!call->outcome.has_value()) call->changed.Wait(&call->mu);
  }

  static void Finish(Call* call, const router::TextStream& text, int prompt_tokens,
                     int completion_tokens, const KvUsage& cost, v1::GenerateResponse* response) {
    MutexLock lock(&call->mu);
    const bool stop = text.stopped() || call->finish_reason == FinishReason::kStop;
    response->set_finish_reason(stop ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_LENGTH);
    if (text.stop_text().has_value()) response->set_stop_text(*text.stop_text());
    if (text.stop_token_id().has_value()) response->set_stop_token_id(*text.stop_token_id());
    v1::Usage* usage = response->mutable_usage();
    usage->set_prompt_tokens(prompt_tokens);
    usage->set_completion_tokens(completion_tokens);
    usage->set_total_tokens(prompt_tokens + completion_tokens);
    v1::KvUsage* kv = response->mutable_kv();
    kv->set_peak_bytes(cost.peak_bytes);
    kv->set_dense_bf16_bytes(cost.dense_bf16_bytes);
    kv->set_live_tokens(cost.live_tokens);
    kv->set_logical_tokens(cost.logical_tokens);
  }

  // The engine thread.
  void Run() {
    while (!stop_) {
      const bool busy = !engine_->idle();
      for (Command& command :
           commands_.PopAll(busy ? absl::ZeroDuration() : absl::InfiniteDuration())) {
        if (command.cancel) {
          EndEarly(command.call.get());
        } else {
          Start(std::move(command.call));
        }
      }
      if (!engine_->Step() && !engine_->idle()) absl::SleepFor(absl::Milliseconds(1));
    }
    for (auto& [id, call] : calls_) call->End(absl::CancelledError("shutting down"), {});
  }

  void Start(CallPtr call) {
    call->request.id = next_id_++;
    const uint64_t id = call->request.id;
    calls_[id] = call;
    if (absl::Status status = engine_->Add(call->request); !status.ok()) {
      calls_.erase(id);
      call->End(std::move(status), {});
    }
  }

  void EndEarly(Call* call) {
    const uint64_t id = call->request.id;
    if (calls_.count(id) == 0) return;
    engine_->Cancel(id);
  }

  // EventSink:
  void OnToken(uint64_t id, int /*index*/, int32_t token, const KvUsage& usage) override {
    Call* call = calls_.at(id).get();
    MutexLock lock(&call->mu);
    call->tokens.push_back(token);
    call->usages.push_back(usage);
    call->changed.NotifyAll();
  }
  void OnFinished(uint64_t id, FinishReason reason, const KvUsage& /*usage*/) override {
    calls_.at(id)->End(absl::OkStatus(), reason);
    calls_.erase(id);
  }
  void OnFailed(uint64_t id, absl::Status status) override {
    calls_.at(id)->End(std::move(status), {});
    calls_.erase(id);
  }

  const LocalOptions options_;
  const std::unique_ptr<Runtime> runtime_;
  const std::unique_ptr<router::ServedModel> model_;
  const std::unique_ptr<Engine> engine_;
  BoundedQueue<Command> commands_;
  std::atomic<bool> stop_{false};
  // The engine thread's.
  std::map<uint64_t, CallPtr> calls_;
  uint64_t next_id_ = 1;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace

absl::StatusOr<std::unique_ptr<Generator>> NewLocalGenerator(const LocalOptions& options) {
  SetLogLevel(LogLevel::kWarning);
  WINNOW_ASSIGN_OR_RETURN(std::unique_ptr<router::ServedModel> model,
                          router::ServedModel::Load(options.model_dir, options.max_model_len));
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  WINNOW_ASSIGN_OR_RETURN(
      std::unique_ptr<Runtime> runtime,
      Runtime::Create({.model_dir = options.model_dir,
                       .adapter_dir = options.adapter_dir,
                       .kv_mode = options.kv_mode,
                       .kv_format = options.kv_format,
                       .kv_budget_bytes = static_cast<size_t>(options.kv_budget_bytes),
                       .prefill_chunk = options.prefill_chunk,
                       .max_num_seqs = options.max_num_seqs,
                       .max_model_len = model->max_model_len(),
                       .threads = options.threads > 0 ? options.threads : cores,
                       .dms_threshold = options.dms_threshold}));
  return std::make_unique<LocalGenerator>(options, std::move(runtime), std::move(model));
}

}  // namespace winnow::cli
