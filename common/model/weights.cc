#include "common/model/weights.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/bf16.h"
#include "common/base/check.h"
#include "common/base/fp8.h"
#include "common/base/status_macros.h"

namespace winnow {
namespace {

using kernels::PackedMatrix;
using Digest = std::array<uint8_t, 32>;

Digest Sha256(const void* data, size_t bytes) {
  Digest digest;
  unsigned int size = 0;
  WINNOW_CHECK(EVP_Digest(data, bytes, digest.data(), &size, EVP_sha256(), nullptr) == 1 &&
               size == digest.size());
  return digest;
}

template <typename T>
T LoadAs(const uint8_t* data, int64_t idx) {
  T value;
  std::memcpy(&value, data + idx * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// Elements [begin, begin + count) as floats. REQUIRES: BF16, F16 or F32.
void ReadFloats(const TensorView& view, int64_t begin, int64_t count, float* out) {
  switch (view.dtype) {
    case DType::kBf16:
      for (int64_t i = 0; i < count; ++i) out[i] = ToFloat(LoadAs<Bf16>(view.data, begin + i));
      return;
    case DType::kF16:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = HalfToFloat(LoadAs<uint16_t>(view.data, begin + i));
      }
      return;
    default:
      WINNOW_CHECK(view.dtype == DType::kF32);
      std::memcpy(out, view.data + begin * static_cast<int64_t>(sizeof(float)),
                  static_cast<size_t>(count) * sizeof(float));
  }
}

// Some rows of a fused matrix.
struct Part {
  const TensorView* view = nullptr;    // [rows, k]
  const TensorView* lora_a = nullptr;  // [rank, k]; null: no update
  const TensorView* lora_b = nullptr;  // [rows, rank]
};

void ConvertPart(const Part& part, int k, float lora_alpha, Bf16* out) {
  const int64_t rows = part.view->dims[0];
  if (part.view->dtype == DType::kBf16 && part.lora_a == nullptr) {
    std::memcpy(out, part.view->data, part.view->bytes);
    return;
  }
  const int64_t rank = part.lora_a == nullptr ? 0 : part.lora_a->dims[0];
  std::vector<float> a(static_cast<size_t>(rank * k)), b(static_cast<size_t>(rank)), row(k);
  if (rank > 0) ReadFloats(*part.lora_a, 0, rank * k, a.data());
  for (int64_t n = 0; n < rows; ++n) {
    ReadFloats(*part.view, n * k, k, row.data());
    if (rank > 0) ReadFloats(*part.lora_b, n * rank, rank, b.data());
    for (int64_t r = 0; r < rank; ++r) {
      const float factor = b[r] * (lora_alpha / static_cast<float>(rank));
      for (int i = 0; i < k; ++i) row[i] += factor * a[r * k + i];
    }
    for (int i = 0; i < k; ++i) out[n * k + i] = ToBf16(row[i]);
  }
}

PackedMatrix PackParts(const std::vector<Part>& parts, int k, float lora_alpha,
                       kernels::WeightArena* arena) {
  int64_t rows = 0;
  for (const Part& part : parts) rows += part.view->dims[0];
  const TensorView& first = *parts[0].view;
  if (parts.size() == 1 && first.dtype == DType::kBf16 && parts[0].lora_a == nullptr &&
      reinterpret_cast<uintptr_t>(first.data) % alignof(Bf16) == 0) {
    return PackedMatrix::Pack(reinterpret_cast<const Bf16*>(first.data), static_cast<int>(rows), k,
                              arena);
  }
  const std::unique_ptr<Bf16[]> fused(new Bf16[static_cast<size_t>(rows * k)]);
  int64_t at = 0;
  for (const Part& part : parts) {
    ConvertPart(part, k, lora_alpha, fused.get() + at * k);
    at += part.view->dims[0];
  }
  return PackedMatrix::Pack(fused.get(), static_cast<int>(rows), k, arena);
}

// Finds and checks the tensors of one set of files, and remembers which were asked for.
class Source {
 public:
  // `absent` and misshapen tensors give `code`.
  Source(const TensorFiles* files, std::string what, absl::StatusCode code)
      : files_(files), what_(std::move(what)), code_(code) {}

  bool Has(const std::string& name) const {
    return files_ != nullptr && files_->Find(name) != nullptr;
  }

  // A dimension of -1 may have any size >= 1.
  absl::StatusOr<const TensorView*> Get(const std::string& name, const std::vector<int64_t>& dims) {
    const TensorView* view = files_ == nullptr ? nullptr : files_->Find(name);
    if (view == nullptr) return absl::Status(code_, absl::StrCat(what_, ": no tensor ", name));
    if (view->dtype != DType::kBf16 && view->dtype != DType::kF16 && view->dtype != DType::kF32) {
      return absl::UnimplementedError(
          absl::StrCat(what_, ": tensor ", name, ": dtype=", DTypeName(view->dtype)));
    }
    bool same = view->dims.size() == dims.size();
    for (size_t i = 0; same && i < dims.size(); ++i) {
      same = dims[i] < 0 ? view->dims[i] >= 1 : view->dims[i] == dims[i];
    }
    if (!same) {
      return absl::Status(code_,
                          absl::StrCat(what_, ": tensor ", name, ": shape=", DimsString(view->dims),
                                       ", the model's is ", DimsString(dims)));
    }
    used_[name] = view;
    return view;
  }

  absl::Status CheckAllUsed() const {
    if (files_ == nullptr) return absl::OkStatus();
    for (const auto& [name, view] : files_->tensors()) {
      if (used_.count(name) == 0) {
        return absl::Status(code_, absl::StrCat(what_, ": tensor ", name, " is of no use here"));
      }
    }
    return absl::OkStatus();
  }

  const std::map<std::string, const TensorView*>& used() const { return used_; }

 private:
  const TensorFiles* const files_;
  const std::string what_;
  const absl::StatusCode code_;
  std::map<std::string, const TensorView*> used_;
};

// Checks everything first, in file order; the work is done by Run().
class Loader {
 public:
  Loader(const ModelConfig& config, const WeightSources& sources)
      : config_(config),
        lora_alpha_(sources.lora_alpha),
        needs_alpha_(sources.needs_alpha),
        model_(sources.model, "model", absl::StatusCode::kInvalidArgument),
        adapter_(sources.adapter, "adapter", absl::StatusCode::kFailedPrecondition) {}

  absl::Status Plan(Weights* weights) {
    const int vocab = config_.vocab_size;
    weights->arena = std::make_unique<kernels::WeightArena>();
    arena_ = weights->arena.get();
    WINNOW_RETURN_IF_ERROR(
        Matrix({"model.embed_tokens.weight"}, {vocab}, config_.hidden, &weights->embedding));
    if (!config_.tie_embeddings) {
      WINNOW_RETURN_IF_ERROR(
          Matrix({"lm_head.weight"}, {vocab}, config_.hidden, &weights->lm_head));
    }
    WINNOW_RETURN_IF_ERROR(
        Floats(&model_, "model.norm.weight", {config_.hidden}, &weights->final_norm));
    weights->layers.resize(static_cast<size_t>(config_.num_layers));
    for (int i = 0; i < config_.num_layers; ++i) {
      const std::string prefix = absl::StrCat("model.layers.", i, ".");
      WINNOW_RETURN_IF_ERROR(PlanLayer(prefix, &weights->layers[static_cast<size_t>(i)]));
    }
    return adapter_.CheckAllUsed();
  }

  // Packs and hashes, on all threads.
  Digest Run(ThreadPool* pool) {
    std::vector<std::pair<std::string, const TensorView*>> tensors;
    for (const Source* source : {&model_, &adapter_}) {
      tensors.insert(tensors.end(), source->used().begin(), source->used().end());
    }
    std::vector<Digest> digests(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      jobs_.push_back(
          [&, i] { digests[i] = Sha256(tensors[i].second->data, tensors[i].second->bytes); });
    }
    pool->ParallelFor(static_cast<int>(jobs_.size()), 1, [&](int begin, int end) {
      for (int i = begin; i < end; ++i) jobs_[static_cast<size_t>(i)]();
    });
    std::string text;
    for (size_t i = 0; i < tensors.size(); ++i) {
      absl::StrAppend(&text, tensors[i].first, " ", DTypeName(tensors[i].second->dtype), " ",
                      DimsString(tensors[i].second->dims), " ");
      text.append(reinterpret_cast<const char*>(digests[i].data()), digests[i].size());
      text.push_back('\n');
    }
    // The merged weights depend on it as well.
    if (lora_alpha_ > 0) absl::StrAppend(&text, absl::StrFormat("lora_alpha %.9g\n", lora_alpha_));
    return Sha256(text.data(), text.size());
  }

 private:
  absl::Status PlanLayer(const std::string& prefix, LayerWeights* layer) {
    const int64_t hidden = config_.hidden, q = config_.q_size(), kv = config_.kv_size();
    const std::string attn = prefix + "self_attn.";
    WINNOW_RETURN_IF_ERROR(
        Floats(&model_, prefix + "input_layernorm.weight", {hidden}, &layer->input_norm));
    WINNOW_RETURN_IF_ERROR(
        Floats(&model_, prefix + "post_attention_layernorm.weight", {hidden}, &layer->mlp_norm));
    WINNOW_RETURN_IF_ERROR(
        Matrix({attn + "q_proj.weight", attn + "k_proj.weight", attn + "v_proj.weight"},
               {q, kv, kv}, hidden, &layer->qkv));
    WINNOW_RETURN_IF_ERROR(Matrix({attn + "o_proj.weight"}, {hidden}, q, &layer->o));
    const std::string mlp = prefix + "mlp.";
    WINNOW_RETURN_IF_ERROR(Matrix({mlp + "gate_proj.weight", mlp + "up_proj.weight"},
                                  {config_.intermediate, config_.intermediate}, hidden,
                                  &layer->gate_up));
    WINNOW_RETURN_IF_ERROR(
        Matrix({mlp + "down_proj.weight"}, {hidden}, config_.intermediate, &layer->down));
    if (config_.has_q_norm) {
      for (const auto& [name, norm] :
           {std::pair("q_norm.weight", &layer->q_norm), {"k_norm.weight", &layer->k_norm}}) {
        WINNOW_RETURN_IF_ERROR(Floats(&model_, attn + name, {config_.head_dim}, norm));
      }
    }
    if (!needs_alpha_) return absl::OkStatus();
    const std::string alpha = attn + "dms_proj_alpha.weight";
    Source* source = adapter_.Has(alpha) || !model_.Has(alpha) ? &adapter_ : &model_;
    WINNOW_RETURN_IF_ERROR(Floats(source, alpha, {config_.num_kv_heads, hidden}, &layer->alpha));
    WINNOW_RETURN_IF_ERROR(
        Floats(source, attn + "dms_proj_alpha_norm.weight", {hidden}, &layer->alpha_norm));
    const std::string bias = attn + "dms_proj_alpha.bias";
    if (!source->Has(bias)) return absl::OkStatus();
    return Floats(source, bias, {config_.num_kv_heads}, &layer->alpha_bias);
  }

  // `names` [rows[i], k] one below the other; each with its update, if there is one.
  absl::Status Matrix(const std::vector<std::string>& names, const std::vector<int64_t>& rows,
                      int64_t k, PackedMatrix* out) {
    std::vector<Part> parts;
    for (size_t i = 0; i < names.size(); ++i) {
      Part part;
      WINNOW_ASSIGN_OR_RETURN(part.view, model_.Get(names[i], {rows[i], k}));
      const std::string stem = names[i].substr(0, names[i].size() - std::strlen("weight"));
      if (adapter_.Has(stem + "lora_A")) {
        WINNOW_ASSIGN_OR_RETURN(part.lora_a, adapter_.Get(stem + "lora_A", {-1, k}));
        WINNOW_ASSIGN_OR_RETURN(part.lora_b,
                                adapter_.Get(stem + "lora_B", {rows[i], part.lora_a->dims[0]}));
      }
      parts.push_back(part);
    }
    jobs_.push_back([parts = std::move(parts), k, out, alpha = lora_alpha_, arena = arena_] {
      *out = PackParts(parts, static_cast<int>(k), alpha, arena);
    });
    return absl::OkStatus();
  }

  absl::Status Floats(Source* source, const std::string& name, const std::vector<int64_t>& dims,
                      std::vector<float>* out) {
    WINNOW_ASSIGN_OR_RETURN(const TensorView* view, source->Get(name, dims));
    jobs_.push_back([view, out] {
      int64_t count = 1;
      for (int64_t dim : view->dims) count *= dim;
      out->resize(static_cast<size_t>(count));
      ReadFloats(*view, 0, count, out->data());
    });
    return absl::OkStatus();
  }

  const ModelConfig& config_;
  kernels::WeightArena* arena_ = nullptr;  // the weights'
  const float lora_alpha_;
  const bool needs_alpha_;
  Source model_;
  Source adapter_;
  std::vector<std::function<void()>> jobs_;
};

}  // namespace

absl::StatusOr<LoadedWeights> LoadWeights(const ModelConfig& config, const WeightSources& sources,
                                          ThreadPool* pool) {
  LoadedWeights loaded;
  Loader loader(config, sources);
  WINNOW_RETURN_IF_ERROR(loader.Plan(&loaded.weights));
  loaded.digest = loader.Run(pool);
  return loaded;
}

}  // namespace winnow
