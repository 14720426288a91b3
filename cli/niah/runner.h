#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/engine/engine.h"
#include "common/engine/runtime.h"
#include "common/tokenizer/tokenizer.h"

namespace winnow::cli {

// What running needle tests needs beside the tests.
struct NiahEngineOptions {
  std::string model_dir;    // resolved
  std::string adapter_dir;  // "": none
  int prefill_chunk = 512;  // tokens
  int threads = 1;
};

struct NiahOutput {
  std::vector<int32_t> ids;    // generated, an end token included
  std::string text;            // of ids, without special tokens
  absl::Duration first_token;  // from the request to the first token
  absl::Duration total;
  KvUsage kv;
};

// One KV cache mode of a model, running one prompt at a time by the engine that serves.
// Not thread-safe.
class NiahRunner : private EventSink {
 public:
  // `mode` as ParseEvalModes() takes one; `max_len` tokens of prompt and output together; the KV
  // budget is made to hold them in any mode.
  //   as ParseEvalModes(), Runtime::Create() and Tokenizer::Load().
  static absl::StatusOr<std::unique_ptr<NiahRunner>> Create(const NiahEngineOptions& options,
                                                            const std::string& mode, int max_len);

  // Until `max_new_tokens` or one of the model's end tokens. Errors as Engine::Add().
  absl::StatusOr<NiahOutput> Run(const std::vector<int32_t>& prompt, int max_new_tokens,
                                 const SamplingParams& sampling, uint64_t seed);

  const Model& model() const { return runtime_->model(); }
  // Runtime::Describe().
  std::string Describe() const { return runtime_->Describe(); }

 private:
  NiahRunner() = default;

  // EventSink:
  void OnToken(uint64_t id, int index, int32_t token, const KvUsage& usage) override;
  void OnFinished(uint64_t id, FinishReason reason, const KvUsage& usage) override;
  void OnFailed(uint64_t id, absl::Status status) override;

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Runtime> runtime_;
  std::unique_ptr<Engine> engine_;
  // Of the prompt that runs.
  NiahOutput output_;
  absl::Time start_;
  absl::Status status_;
  uint64_t next_id_ = 1;
};

}  // namespace winnow::cli
