#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/base/thread_pool.h"
#include "common/engine/engine.h"
#include "common/kv/kv_cache.h"
#include "common/kv/kv_mode.h"
#include "common/model/model.h"
#include "common/model/transformer.h"

namespace winnow {

// A KV budget that holds one sequence of `max_len` tokens in any mode, nothing evicted, with
// room to spare; what is not used is never touched.
size_t SingleSequenceKvBudget(const ModelConfig& config, int max_len);

struct RuntimeOptions {
  std::string model_dir;
  std::string adapter_dir;  // empty: none
  std::string kv_mode = "dense-fp8";
  std::string kv_format;  // as ParseKvMode() takes it; empty: kv_mode's
  size_t kv_budget_bytes = size_t{512} << 20;
  int prefill_chunk = 512;  // tokens; [1, 65536]
  int max_num_seqs = 32;    // [1, 4096]
  int max_model_len = 0;    // tokens; 0: the model's own
  int threads = 1;          // [1, 1024]
  ActivationType activations = ActivationType::kBf16;
  float dms_threshold = 0;  // evict iff a token's DMS logit is above it; see Transformer::Options
};

// A model with what it takes to run it: thread pool, KV cache, transformer. One for
// each engine thread.
class Runtime {
 public:
  // Loads the model and allocates everything, from one budget that is logged.
  //   INVALID_ARGUMENT     an option out of range, by name.
  //   FAILED_PRECONDITION  a dms- mode for a model without DMS data.
  //   others               Model::Load(), KvCache::Create().
  static absl::StatusOr<std::unique_ptr<Runtime>> Create(const RuntimeOptions& options);
  // The same over a model that is loaded already, which several runtimes may share:
  // LoadModel() of options alike in model, adapter and the mode's dense or dms half.
  static absl::StatusOr<std::unique_ptr<Runtime>> Create(const RuntimeOptions& options,
                                                         std::shared_ptr<const Model> model);
  // The weights that the mode runs: a dense mode leaves the adapter out.
  static absl::StatusOr<std::shared_ptr<const Model>> LoadModel(const RuntimeOptions& options);

  const RuntimeOptions& options() const { return options_; }  // max_model_len resolved
  const Model& model() const { return *model_; }
  const KvMode& kv_mode() const { return kv_mode_; }
  // What decides the model's output beside the input, as one line: mode, decision rule,
  // window, shift, activations, weights (SHA-256). Equal lines, equal tokens.
  std::string Describe() const;
  KvCache* cache() { return cache_.get(); }
  Transformer* transformer() { return transformer_.get(); }
  const Transformer& transformer() const { return *transformer_; }

  // An engine over this runtime. `sink` and *this must outlive it. One at a time.
  std::unique_ptr<Engine> NewEngine(EventSink* sink, int max_waiting = 1024);

 private:
  explicit Runtime(const RuntimeOptions& options) : options_(options), pool_(options.threads) {}

  RuntimeOptions options_;
  KvMode kv_mode_;
  ThreadPool pool_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Transformer> transformer_;
};

}  // namespace winnow
