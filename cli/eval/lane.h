#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "cli/eval/modes.h"
#include "common/engine/runtime.h"

namespace winnow::cli {

// What the lanes of an evaluation have in common.
struct LaneOptions {
  std::string model_dir;
  std::string adapter_dir;  // empty: none
  int context = 2048;       // longest sequence, tokens
  int prefill_chunk = 256;  // most tokens of one Run()
  int threads = 1;
};

// One mode with one sequence: a text goes in piece by piece, logits come out. Owned by
// one thread.
class Lane {
 public:
  // Errors of Runtime::Create(). `model` as there, shared with other lanes.
  static absl::StatusOr<std::unique_ptr<Lane>> Create(const LaneOptions& options,
                                                      const EvalMode& mode,
                                                      ActivationType activations,
                                                      std::shared_ptr<const Model> model);

  const std::string& name() const { return name_; }
  const Model& model() const { return runtime_->model(); }
  std::string Describe() const { return runtime_->Describe(); }
  // The sequence since Begin().
  const SequenceCache& cache() const { return *cache_; }

  // Drops the sequence and starts an empty one.
  absl::Status Begin();
  // The next tokens, at most prefill_chunk; one alone goes the way of a decode step.
  // `logits` [tokens, vocab], `decisions` [layers, tokens, KV heads]; null: not wanted.
  absl::Status Run(absl::Span<const int32_t> tokens, float* logits, uint8_t* decisions = nullptr);

 private:
  Lane(std::string name, std::unique_ptr<Runtime> runtime)
      : name_(std::move(name)), runtime_(std::move(runtime)) {}

  const std::string name_;
  const std::unique_ptr<Runtime> runtime_;
  std::optional<SequenceCache> cache_;
};

// The models that lanes share: the dense modes' and the dms- modes', each loaded once,
// when first asked for.
class LaneModels {
 public:
  LaneModels(std::string model_dir, std::string adapter_dir)
      : model_dir_(std::move(model_dir)), adapter_dir_(std::move(adapter_dir)) {}

  absl::StatusOr<std::shared_ptr<const Model>> Get(const std::string& kv_mode);

 private:
  const std::string model_dir_;
  const std::string adapter_dir_;
  std::shared_ptr<const Model> dense_;
  std::shared_ptr<const Model> dms_;
};

}  // namespace winnow::cli
