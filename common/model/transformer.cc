#include "common/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status_macros.h"
#include "common/model/cpu_backend.h"
#include "kernels/rope.h"

namespace winnow {
namespace {

// Logits are computed for this many rows at a time: scratch stays small where all
// rows of a long chunk are wanted.
constexpr int kLogitRows = 64;

// GEMM inputs [num_rows, width], in the type that the GEMMs read.
class Activations {
 public:
  Activations(ActivationType type, int num_rows, int width) : width_(width) {
    const size_t size = static_cast<size_t>(num_rows) * static_cast<size_t>(width);
    if (type == ActivationType::kBf16) {
      bf16_.resize(size);
    } else {
      f32_.resize(size);
    }
  }
  // The first element of `row`; the other type's pointer is null.
  Bf16* bf16(int64_t row = 0) { return bf16_.empty() ? nullptr : bf16_.data() + row * width_; }
  float* f32(int64_t row = 0) { return f32_.empty() ? nullptr : f32_.data() + row * width_; }
  int width() const { return width_; }

 private:
  const int width_;
  std::vector<Bf16> bf16_;
  std::vector<float> f32_;
};

std::vector<float> Floats(int num_rows, int width) {
  return std::vector<float>(static_cast<size_t>(num_rows) * static_cast<size_t>(width));
}

kernels::RopeTable MakeRope(const ModelConfig& config, int num_positions) {
  absl::StatusOr<kernels::RopeTable> table = kernels::BuildRopeTable(
      config.head_dim, num_positions, config.rope_theta, config.rope_scaling);
  WINNOW_CHECK(table.ok());  // LoadModelConfig() checked what it depends on
  return *std::move(table);
}

// Dense modes keep all; a borrowed channel is zeroed all the same, as the checkpoint
// was trained.
kernels::DecisionRule MakeRule(const Model& model, bool dms, const Transformer::Options& options) {
  kernels::DecisionRule rule;
  if (model.dms().has_value()) rule = model.dms()->rule;
  rule.offset += options.dms_threshold;
  if (!dms) rule.source = kernels::DecisionSource::kNone;
  rule.round_to_bf16 = options.activations == ActivationType::kBf16;
  return rule;
}

}  // namespace

// Rows of a batch: the one-token items first, then the chunks. A row's bits do not
// depend on its place.
struct Transformer::Impl {
  Impl(const Model* model, KvCache* cache, ThreadPool* pool, const Options& options);

  absl::Status CheckItems(absl::Span<const Item> items) const;
  void ArrangeRows(absl::Span<const Item> items);
  absl::Status Gemm(Activations* in, const kernels::PackedMatrix& w, int num_rows, float* out,
                    bool accumulate);
  absl::Status Norm(const std::vector<float>& weight, int num_rows, const float* in,
                    Activations* out);
  absl::Status DmsLogits(const LayerWeights& layer);
  kernels::DmsCompactParams CompactParams(const LayerWeights& layer, int first, int count);
  absl::Status Decode(int layer_idx);
  absl::Status Prefill(int layer_idx);
  void CopyDecisions(int layer_idx);
  absl::Status Mlp(const LayerWeights& layer);
  absl::Status Logits();

  const Model& model;
  const ModelConfig& config;
  const kernels::KvLayout layout;
  const int max_tokens;
  const int max_positions;
  const kernels::DecisionRule rule;
  const kernels::RopeTable rope;
  const int qkv_width;
  const int64_t row_bytes;  // of all KV heads of a token
  CpuBackend cpu_backend;
  Backend& backend;
  kernels::ThreadScratch attention_scratch;

  // The batch.
  int num_rows = 0;
  int num_decode = 0;                          // rows of one-token items
  std::vector<const Item*> items;              // in order of rows
  std::vector<int32_t> tokens;                 // [num_rows]
  std::vector<int32_t> positions;              // [num_rows]
  std::vector<kernels::Span*> spans;           // [num_decode]; of the current layer
  std::vector<std::pair<int, float*>> wanted;  // row, where its logits go

  // Activations, [max_tokens, ...] each.
  std::vector<float> residual;   // hidden
  Activations normed;            // hidden
  std::vector<float> alpha_in;   // hidden; empty: no separate projection
  std::vector<float> alpha_out;  // num_kv_heads
  std::vector<float> qkv;        // qkv_width
  std::vector<float> q;          // num_heads, head_dim; after RoPE
  std::vector<uint8_t> rows;     // num_kv_heads, TokenBytes
  std::vector<uint8_t> evict;    // num_kv_heads; empty: all keep
  Activations attended;          // num_heads, head_dim
  std::vector<float> gate_up;    // 2 * intermediate
  Activations mlp;               // intermediate
  // [kLogitRows, ...] each.
  std::vector<float> last;    // hidden
  Activations last_normed;    // hidden
  std::vector<float> logits;  // vocab
};

Transformer::Impl::Impl(const Model* m, KvCache* cache, ThreadPool* pool, const Options& options)
    : model(*m),
      config(m->config()),
      layout(cache->layout()),
      max_tokens(options.max_tokens),
      max_positions(options.max_positions > 0
                        ? std::min(options.max_positions, config.max_position_embeddings)
                        : config.max_position_embeddings),
      rule(MakeRule(*m, cache->options().window > 0, options)),
      rope(MakeRope(config, max_positions)),
      qkv_width(config.q_size() + 2 * config.kv_size()),
      row_bytes(static_cast<int64_t>(kernels::TokenBytes(layout.format, config.head_dim)) *
                config.num_kv_heads),
      cpu_backend(pool),
      backend(options.backend != nullptr ? *options.backend : cpu_backend),
      attention_scratch(pool->num_threads(),
                        kernels::AttentionScratchBytes(config.num_heads, config.num_kv_heads,
                                                       config.head_dim, max_positions)),
      tokens(static_cast<size_t>(max_tokens)),
      positions(static_cast<size_t>(max_tokens)),
      spans(static_cast<size_t>(max_tokens)),
      residual(Floats(max_tokens, config.hidden)),
      normed(options.activations, max_tokens, config.hidden),
      qkv(Floats(max_tokens, qkv_width)),
      q(Floats(max_tokens, config.q_size())),
      rows(static_cast<size_t>(max_tokens) * static_cast<size_t>(row_bytes)),
      attended(options.activations, max_tokens, config.q_size()),
      gate_up(Floats(max_tokens, 2 * config.intermediate)),
      mlp(options.activations, max_tokens, config.intermediate),
      last(Floats(kLogitRows, config.hidden)),
      last_normed(options.activations, kLogitRows, config.hidden),
      logits(Floats(kLogitRows, config.vocab_size)) {
  items.reserve(static_cast<size_t>(max_tokens));
  wanted.reserve(static_cast<size_t>(max_tokens));
  if (rule.source == kernels::DecisionSource::kNone) return;
  evict.resize(static_cast<size_t>(max_tokens) * static_cast<size_t>(config.num_kv_heads));
  if (rule.source != kernels::DecisionSource::kLogits) return;
  alpha_in = Floats(max_tokens, config.hidden);
  alpha_out = Floats(max_tokens, config.num_kv_heads);
}

absl::Status Transformer::Impl::CheckItems(absl::Span<const Item> batch) const {
  size_t total = 0;
  for (const Item& item : batch) {
    if (item.cache == nullptr || item.tokens.empty()) {
      return absl::InvalidArgumentError("an item without a cache or tokens");
    }
    total += item.tokens.size();
    if (total > static_cast<size_t>(max_tokens)) {
      return absl::InvalidArgumentError(
          absl::StrCat("a step of more than max_tokens=", max_tokens, " tokens"));
    }
    const size_t length = static_cast<size_t>(item.cache->length()) + item.tokens.size();
    if (length > static_cast<size_t>(max_positions)) {
      return absl::InvalidArgumentError(
          absl::StrCat("a sequence of ", length, " tokens, the longest is ", max_positions));
    }
    for (int32_t token : item.tokens) {
      if (token < 0 || token >= config.vocab_size) {
        return absl::InvalidArgumentError(
            absl::StrCat("token ", token, " is outside [0, ", config.vocab_size, ")"));
      }
    }
  }
  return absl::OkStatus();
}

void Transformer::Impl::ArrangeRows(absl::Span<const Item> batch) {
  items.clear();
  wanted.clear();
  num_rows = 0;
  for (const bool decode : {true, false}) {
    for (const Item& item : batch) {
      const int count = static_cast<int>(item.tokens.size());
      if ((count == 1) != decode) continue;
      items.push_back(&item);
      const int start = item.cache->length();
      for (int i = 0; i < count; ++i) {
        tokens[static_cast<size_t>(num_rows + i)] = item.tokens[static_cast<size_t>(i)];
        positions[static_cast<size_t>(num_rows + i)] = start + i;
      }
      if (item.logits != nullptr) {
        const int first = item.all_logits ? 0 : count - 1;
        for (int64_t i = first; i < count; ++i) {
          wanted.emplace_back(num_rows + static_cast<int>(i),
                              item.logits + (i - first) * config.vocab_size);
        }
      }
      num_rows += count;
    }
    if (decode) num_decode = num_rows;
  }
}

absl::Status Transformer::Impl::Gemm(Activations* in, const kernels::PackedMatrix& w, int m,
                                     float* out, bool accumulate) {
  return backend.Gemm({.a_bf16 = in->bf16(),
                       .a_f32 = in->f32(),
                       .w = &w,
                       .out = out,
                       .m = m,
                       .lda = in->width(),
                       .ldo = w.n(),
                       .accumulate = accumulate});
}

absl::Status Transformer::Impl::Norm(const std::vector<float>& weight, int m, const float* in,
                                     Activations* out) {
  return backend.RmsNorm({.x = in,
                          .weight = weight.data(),
                          .out_bf16 = out->bf16(),
                          .out_f32 = out->f32(),
                          .m = m,
                          .n = config.hidden,
                          .ldx = config.hidden,
                          .eps = config.rms_norm_eps});
}

// Reads the residual stream as it is before the layer's input norm.
absl::Status Transformer::Impl::DmsLogits(const LayerWeights& layer) {
  WINNOW_RETURN_IF_ERROR(backend.RmsNorm({.x = residual.data(),
                                          .weight = layer.alpha_norm.data(),
                                          .out_f32 = alpha_in.data(),
                                          .m = num_rows,
                                          .n = config.hidden,
                                          .ldx = config.hidden,
                                          .eps = config.rms_norm_eps}));
  return backend.DmsLogits({.x = alpha_in.data(),
                            .weight = layer.alpha.data(),
                            .bias = layer.alpha_bias.empty() ? nullptr : layer.alpha_bias.data(),
                            .out = alpha_out.data(),
                            .m = num_rows,
                            .hidden = config.hidden,
                            .num_kv_heads = config.num_kv_heads});
}

// For rows [first, first + count).
kernels::DmsCompactParams Transformer::Impl::CompactParams(const LayerWeights& layer, int first,
                                                           int count) {
  const float* in = qkv.data() + static_cast<int64_t>(first) * qkv_width;
  const int64_t heads = static_cast<int64_t>(first) * config.num_kv_heads;
  return {.q = in,
          .k = in + config.q_size(),
          .v = in + config.q_size() + config.kv_size(),
          .q_stride = qkv_width,
          .k_stride = qkv_width,
          .v_stride = qkv_width,
          .q_norm = layer.q_norm.empty() ? nullptr : layer.q_norm.data(),
          .k_norm = layer.k_norm.empty() ? nullptr : layer.k_norm.data(),
          .norm_eps = config.rms_norm_eps,
          .logit_inputs = alpha_out.empty() ? nullptr : alpha_out.data() + heads,
          .logit_stride = config.num_kv_heads,
          .positions = positions.data() + first,
          .rope_cos = rope.cos.data(),
          .rope_sin = rope.sin.data(),
          .num_positions = rope.num_positions,
          .rule = rule,
          .format = layout.format,
          .q_out = q.data() + static_cast<int64_t>(first) * config.q_size(),
          .rows = rows.data() + first * row_bytes,
          .decisions = evict.empty() ? nullptr : evict.data() + heads,
          .num_tokens = count,
          .num_heads = config.num_heads,
          .num_kv_heads = config.num_kv_heads,
          .head_dim = config.head_dim};
}

// The one-token items: each token enters its spans, then attends over them.
absl::Status Transformer::Impl::Decode(int layer_idx) {
  if (num_decode == 0) return absl::OkStatus();
  const LayerWeights& layer = model.weights().layers[static_cast<size_t>(layer_idx)];
  for (int i = 0; i < num_decode; ++i) {
    spans[static_cast<size_t>(i)] = items[static_cast<size_t>(i)]->cache->StepSpans(layer_idx);
  }
  WINNOW_RETURN_IF_ERROR(backend.DecodePrepare(
      {.compact = CompactParams(layer, 0, num_decode), .layout = layout, .spans = spans.data()}));
  return backend.CompactDecodeAttention(
      {.layout = layout,
       .spans = spans.data(),
       .q = q.data(),
       .out_f32 = attended.f32(),
       .out_bf16 = attended.bf16(),
       .num_seqs = num_decode,
       .num_heads = config.num_heads,
       .num_kv_heads = config.num_kv_heads,
       .scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim)),
       .scratch = &attention_scratch});
}

// The chunks: each attends over its prefix and itself, then is appended.
absl::Status Transformer::Impl::Prefill(int layer_idx) {
  if (num_rows == num_decode) return absl::OkStatus();
  const LayerWeights& layer = model.weights().layers[static_cast<size_t>(layer_idx)];
  WINNOW_RETURN_IF_ERROR(
      backend.DmsCompact(CompactParams(layer, num_decode, num_rows - num_decode)));
  int row = num_decode;
  for (size_t i = static_cast<size_t>(num_decode); i < items.size(); ++i) {
    const int count = static_cast<int>(items[i]->tokens.size());
    const uint8_t* chunk = rows.data() + row * row_bytes;
    const uint8_t* decisions =
        evict.empty() ? nullptr : evict.data() + static_cast<int64_t>(row) * config.num_kv_heads;
    WINNOW_RETURN_IF_ERROR(
        backend.DmsPrefillAttention({.layout = layout,
                                     .spans = items[i]->cache->spans(layer_idx),
                                     .q = q.data() + static_cast<int64_t>(row) * config.q_size(),
                                     .rows = chunk,
                                     .decisions = decisions,
                                     .out_f32 = attended.f32(row),
                                     .out_bf16 = attended.bf16(row),
                                     .num_tokens = count,
                                     .num_heads = config.num_heads,
                                     .num_kv_heads = config.num_kv_heads,
                                     .scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim)),
                                     .scratch = &attention_scratch}));
    WINNOW_RETURN_IF_ERROR(items[i]->cache->Append(layer_idx, chunk, decisions, count));
    row += count;
  }
  return absl::OkStatus();
}

// To the items that want to see them.
void Transformer::Impl::CopyDecisions(int layer_idx) {
  if (evict.empty()) return;
  size_t row = 0;
  const size_t heads = static_cast<size_t>(config.num_kv_heads);
  for (const Item* item : items) {
    const size_t count = item->tokens.size();
    if (item->decisions != nullptr) {
      std::memcpy(item->decisions + static_cast<size_t>(layer_idx) * count * heads,
                  evict.data() + row * heads, count * heads);
    }
    row += count;
  }
}

absl::Status Transformer::Impl::Mlp(const LayerWeights& layer) {
  WINNOW_RETURN_IF_ERROR(Norm(layer.mlp_norm, num_rows, residual.data(), &normed));
  WINNOW_RETURN_IF_ERROR(Gemm(&normed, layer.gate_up, num_rows, gate_up.data(), false));
  WINNOW_RETURN_IF_ERROR(backend.SwiGlu({.x = gate_up.data(),
                                         .out_bf16 = mlp.bf16(),
                                         .out_f32 = mlp.f32(),
                                         .m = num_rows,
                                         .intermediate = config.intermediate,
                                         .ldx = 2 * static_cast<int64_t>(config.intermediate)}));
  return Gemm(&mlp, layer.down, num_rows, residual.data(), true);
}

absl::Status Transformer::Impl::Logits() {
  const size_t hidden_bytes = static_cast<size_t>(config.hidden) * sizeof(float);
  const size_t vocab_bytes = static_cast<size_t>(config.vocab_size) * sizeof(float);
  for (size_t begin = 0; begin < wanted.size(); begin += kLogitRows) {
    const size_t count = std::min<size_t>(kLogitRows, wanted.size() - begin);
    for (size_t i = 0; i < count; ++i) {
      const int64_t row = wanted[begin + i].first;
      std::memcpy(last.data() + i * static_cast<size_t>(config.hidden),
                  residual.data() + row * config.hidden, hidden_bytes);
    }
    const int m = static_cast<int>(count);
    WINNOW_RETURN_IF_ERROR(Norm(model.weights().final_norm, m, last.data(), &last_normed));
    WINNOW_RETURN_IF_ERROR(Gemm(&last_normed, model.weights().output(), m, logits.data(), false));
    for (size_t i = 0; i < count; ++i) {
      std::memcpy(wanted[begin + i].second,
                  logits.data() + i * static_cast<size_t>(config.vocab_size), vocab_bytes);
    }
  }
  return absl::OkStatus();
}

Transformer::Transformer(const Model* model, KvCache* cache, ThreadPool* pool, Options options)
    : impl_(std::make_unique<Impl>(model, cache, pool, options)) {}

Transformer::~Transformer() = default;

const kernels::DecisionRule& Transformer::decision_rule() const { return impl_->rule; }

absl::Status Transformer::Forward(absl::Span<const Item> items, const LayerDone& layer_done) {
  Impl& run = *impl_;
  const Weights& weights = run.model.weights();
  WINNOW_RETURN_IF_ERROR(run.CheckItems(items));
  run.ArrangeRows(items);
  if (run.num_rows == 0) return absl::OkStatus();
  WINNOW_RETURN_IF_ERROR(run.backend.Embedding({.table = &weights.embedding,
                                                .tokens = run.tokens.data(),
                                                .out = run.residual.data(),
                                                .num_tokens = run.num_rows}));
  for (int i = 0; i < run.config.num_layers; ++i) {
    const LayerWeights& layer = weights.layers[static_cast<size_t>(i)];
    float* residual = run.residual.data();
    if (!run.alpha_out.empty()) WINNOW_RETURN_IF_ERROR(run.DmsLogits(layer));
    WINNOW_RETURN_IF_ERROR(run.Norm(layer.input_norm, run.num_rows, residual, &run.normed));
    WINNOW_RETURN_IF_ERROR(run.Gemm(&run.normed, layer.qkv, run.num_rows, run.qkv.data(), false));
    WINNOW_RETURN_IF_ERROR(run.Decode(i));
    WINNOW_RETURN_IF_ERROR(run.Prefill(i));
    run.CopyDecisions(i);
    if (layer_done) layer_done(i);
    WINNOW_RETURN_IF_ERROR(run.Gemm(&run.attended, layer.o, run.num_rows, residual, true));
    WINNOW_RETURN_IF_ERROR(run.Mlp(layer));
  }
  return run.Logits();
}

}  // namespace winnow
