#include "tests/kernels/prefix_cache_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cuda/decode_prepare.h"
#include "kernels/decode_prepare.h"
#include "kernels/dms_prefill_attention.h"

namespace winnow::kernels {

void PrefixCacheGpu::SetUp() {
  RequireGpu();
  if (IsSkipped() || HasFatalFailure()) return;
  const CacheCase& c = GetParam();
  slots_per_page_ = SlotsPerPage(c.format, c.head_dim);
  const int num_spans = kLayers * kSequences * c.num_kv_heads;
  num_pages_ = num_spans * ((c.max_tokens + c.window) / slots_per_page_ + 3);
  spans_ = std::make_unique<DeviceSpanCase>(DeviceSpanShape{.format = c.format,
                                                            .head_dim = c.head_dim,
                                                            .window = c.window,
                                                            .shift = c.shift,
                                                            .num_layers = kLayers,
                                                            .num_kv_heads = c.num_kv_heads,
                                                            .spare_pages = num_pages_,
                                                            .max_survivors = c.max_tokens},
                                            kSequences, std::vector<SpanLength>(Size(num_spans)));
  spans_->state->Set(std::vector<SpanState>(Size(num_spans)));
  for (int i = 0; i < num_spans; ++i) {
    Span& span = spans_->span(0, 0, i);
    span.num_tokens = 0;
    span.newest_evict = 0;
  }
  cpu_free_ = spans_->spare_pages();
  free_pages_ = std::make_unique<DeviceArray<int32_t>>(spans_->spare_pages());
  num_free_ = std::make_unique<DeviceArray<int32_t>>(std::vector<int32_t>{num_pages_});
  exhausted_ = std::make_unique<DeviceArray<int32_t>>(std::vector<int32_t>{0});
  dim_ = Size(c.head_dim);
  kv_ = Size(c.num_kv_heads) * dim_;
  heads_ = kv_ * Size(c.group);
  row_ = heads_ + 2 * kv_;
  row_bytes_ = TokenBytes(c.format, c.head_dim);
  q_norm_ = Random(dim_);
  k_norm_ = Random(dim_);
  absl::StatusOr<RopeTable> rope = BuildRopeTable(c.head_dim, c.max_tokens, 10000.0f);
  ASSERT_TRUE(rope.ok());
  rope_ = *rope;
  d_q_norm_ = std::make_unique<DeviceArray<float>>(q_norm_);
  d_k_norm_ = std::make_unique<DeviceArray<float>>(k_norm_);
  d_cos_ = std::make_unique<DeviceArray<float>>(rope_.cos);
  d_sin_ = std::make_unique<DeviceArray<float>>(rope_.sin);
  history_.resize(Size(kLayers * kSequences));
}

std::vector<float> PrefixCacheGpu::Random(size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& value : x) value = normal(rng_);
  return x;
}

DmsCompactParams PrefixCacheGpu::CpuParams(const float* qkv, const int32_t* positions,
                                           int n) const {
  const CacheCase& c = GetParam();
  const int64_t stride = static_cast<int64_t>(row_);
  return {.q = qkv,
          .k = qkv + heads_,
          .v = qkv + heads_ + kv_,
          .q_stride = stride,
          .k_stride = stride,
          .v_stride = stride,
          .q_norm = q_norm_.data(),
          .k_norm = k_norm_.data(),
          .positions = positions,
          .rope_cos = rope_.cos.data(),
          .rope_sin = rope_.sin.data(),
          .num_positions = c.max_tokens,
          .rule = c.rule,
          .format = c.format,
          .num_tokens = n,
          .num_heads = c.num_kv_heads * c.group,
          .num_kv_heads = c.num_kv_heads,
          .head_dim = c.head_dim};
}

void PrefixCacheGpu::AttachPages(Span* span, const PageNeed& need) {
  for (int i = 0; i < need.ring; ++i, cpu_free_.pop_back()) {
    spans_->AddPage(&span->ring, cpu_free_.back());
  }
  for (int i = 0; i < need.survivors; ++i, cpu_free_.pop_back()) {
    spans_->AddPage(&span->survivors, cpu_free_.back());
  }
}

void PrefixCacheGpu::Remember(History* history, const uint8_t* row, uint8_t decision) {
  const CacheCase& c = GetParam();
  std::vector<float> k(dim_), v(dim_);
  LoadK(c.format, c.head_dim, RowToken(c.format, c.head_dim, row), k.data());
  LoadV(c.format, c.head_dim, RowToken(c.format, c.head_dim, row), v.data());
  for (const float value : k) history->k.push_back(ToBf16(value));
  for (const float value : v) history->v.push_back(ToBf16(value));
  history->decisions.push_back(decision);
}

// The chunk's rows `out` against the CPU's over the whole sequence at once, which reads the
// same BF16 values.
void PrefixCacheGpu::CheckAttention(int layer, int sequence, const std::vector<Bf16>& out) {
  const CacheCase& c = GetParam();
  const History& h = history_[Size(layer * kSequences + sequence)];
  const size_t tokens = h.q.size() / heads_, vectors = tokens * Size(c.num_kv_heads);
  std::vector<uint8_t> rows(vectors * dim_ * 4);
  float largest_v = 0.0f, longest_q = 0.0f, longest_k = 0.0f;
  const auto length = [&](const Bf16* x) {
    float sum = 0.0f;
    for (size_t d = 0; d < dim_; ++d) sum += ToFloat(x[d]) * ToFloat(x[d]);
    return std::sqrt(sum);
  };
  for (size_t i = 0; i < vectors; ++i) {
    std::memcpy(&rows[i * dim_ * 4], &h.k[i * dim_], dim_ * 2);
    std::memcpy(&rows[i * dim_ * 4 + dim_ * 2], &h.v[i * dim_], dim_ * 2);
    longest_k = std::max(longest_k, length(&h.k[i * dim_]));
    for (size_t d = 0; d < dim_; ++d) {
      largest_v = std::max(largest_v, std::fabs(ToFloat(h.v[i * dim_ + d])));
    }
  }
  for (size_t i = 0; i < h.q.size(); i += dim_) {
    longest_q = std::max(longest_q, length(&h.q[i]));
  }
  std::vector<float> q(h.q.size()), want(h.q.size());
  std::transform(h.q.begin(), h.q.end(), q.begin(), [](Bf16 x) { return ToFloat(x); });
  const std::vector<Span> empty(Size(c.num_kv_heads));
  const int num_heads = c.num_kv_heads * c.group, num_tokens = static_cast<int>(tokens);
  ThreadScratch scratch(1,
                        AttentionScratchBytes(num_heads, c.num_kv_heads, c.head_dim, num_tokens));
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  const absl::Status status = DmsPrefillAttentionCpu(
      {.layout = {.format = KvFormatId::kBf16,
                  .head_dim = c.head_dim,
                  .window = std::max(c.window, 1),
                  .shift = c.shift,
                  .slots_per_page = SlotsPerPage(KvFormatId::kBf16, c.head_dim)},
       .spans = empty.data(),
       .q = q.data(),
       .rows = rows.data(),
       .decisions = c.window == 0 ? nullptr : h.decisions.data(),
       .out_f32 = want.data(),
       .num_tokens = num_tokens,
       .num_heads = num_heads,
       .num_kv_heads = c.num_kv_heads,
       .scale = scale,
       .scratch = &scratch},
      nullptr);
  ASSERT_TRUE(status.ok()) << status;
  // As in dms_prefill_gpu_test.cc: weights and outputs rounded to BF16, float32 sums.
  const float score_error = static_cast<float>(dim_) * 0x1p-23f * scale * longest_q * longest_k;
  const float base =
      largest_v * (0x1p-9f + 2.0f * score_error + static_cast<float>(tokens) * 0x1p-23f);
  int wrong = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const float expected = want[want.size() - out.size() + i];
    const float error = std::fabs(ToFloat(out[i]) - expected);
    if (!(error <= base + 0x1p-9f * std::fabs(expected))) ++wrong;  // also NaN
  }
  EXPECT_EQ(wrong, 0) << "outputs of " << out.size();
}

void PrefixCacheGpu::CheckCache(const std::string& when) {
  const CacheCase& c = GetParam();
  const std::vector<SpanState> state = spans_->state->Get();
  const std::vector<int32_t> survivors = spans_->survivor_pages->Get();
  const std::vector<int32_t> ring = spans_->ring_pages->Get();
  const std::vector<uint8_t> pages = spans_->pages->Get(), newest = spans_->newest->Get();
  const std::vector<uint8_t> flags = spans_->ring_evict->Get();
  const DeviceSpans d = spans_->device();
  const KvLayout layout = spans_->layout();
  std::vector<int32_t> held = free_pages_->Get();
  held.resize(Size(num_free_->Get()[0]));
  for (size_t at = 0; at < state.size(); ++at) {
    const Span& want = spans_->span(0, 0, static_cast<int>(at));
    SCOPED_TRACE(when + ", span " + std::to_string(at));
    ASSERT_EQ(state[at].num_survivors, want.num_survivors);
    ASSERT_EQ(state[at].num_ring, want.num_ring);
    ASSERT_EQ(state[at].ring_start, want.ring_start);
    ASSERT_EQ(state[at].num_tokens, want.num_tokens);
    const int32_t* own_survivors = &survivors[at * Size(d.max_survivor_pages)];
    const int32_t* own_ring = ring.data() + at * Size(d.ring_pages_per_span());
    held.insert(held.end(), own_survivors, own_survivors + want.survivors.num_pages);
    held.insert(held.end(), own_ring, own_ring + want.ring.num_pages);
    if (want.num_tokens == 0) continue;
    ASSERT_EQ(
        std::memcmp(&newest[at * static_cast<size_t>(d.newest_stride())], want.newest, row_bytes_),
        0);
    if (c.window > 0) {
      const uint8_t* own_flags = &flags[at * static_cast<size_t>(d.evict_stride())];
      ASSERT_EQ(std::memcmp(own_flags, want.ring_evict, Size(want.num_ring)), 0);
      ASSERT_EQ(own_flags[c.window], want.newest_evict);
    }
    std::vector<uint8_t> a(row_bytes_), b(row_bytes_);
    const auto compare = [&](const PageTable& table, const int32_t* ids, int n) {
      for (int t = 0; t < n; ++t) {
        const int page = t / slots_per_page_, slot = t % slots_per_page_;
        CopyPageToRow(c.format, c.head_dim, layout.Page(table.At(page)), slot, a.data());
        CopyPageToRow(c.format, c.head_dim, &pages[Size(ids[page]) * layout.page_bytes], slot,
                      b.data());
        ASSERT_EQ(a, b) << "slot " << t;
      }
    };
    compare(want.survivors, own_survivors, want.num_survivors);
    compare(want.ring, own_ring, want.num_ring);
  }
  std::sort(held.begin(), held.end());
  ASSERT_EQ(held.size(), Size(num_pages_));
  for (int i = 0; i < num_pages_; ++i) ASSERT_EQ(held[Size(i)], i);
}

void PrefixCacheGpu::DecodeSteps(int steps) {
  const CacheCase& c = GetParam();
  const size_t kv_heads = Size(c.num_kv_heads), n = Size(kSequences);
  const DeviceArray<int32_t> slots(std::vector<int32_t>{0, 1, 2});
  for (int step = 0; step < steps; ++step) {
    absl::Status status = LaunchDecodeStep(
        {.spans = spans_->device(), .pool = pool(), .slots = slots.get(), .num_seqs = kSequences},
        nullptr);
    ASSERT_TRUE(status.ok()) << status;
    for (int layer = 0; layer < kLayers; ++layer) {
      std::vector<int32_t> positions;
      std::vector<Span*> cpu_spans;
      for (int s = 0; s < kSequences; ++s) {
        positions.push_back(spans_->span(layer, s, 0).num_tokens);
        cpu_spans.push_back(&spans_->span(layer, s, 0));
        for (int g = 0; g < c.num_kv_heads; ++g) {
          Span& span = spans_->span(layer, s, g);
          AttachPages(&span, CountPageNeed(spans_->layout(), span, 1, nullptr, 0));
        }
      }
      const std::vector<float> qkv = Random(n * row_);
      std::vector<float> q(n * heads_);
      std::vector<uint8_t> rows(n * kv_heads * row_bytes_), decisions(n * kv_heads);
      DmsCompactParams compact = CpuParams(qkv.data(), positions.data(), kSequences);
      compact.q_out = q.data();
      compact.rows = rows.data();
      compact.decisions = decisions.data();
      status = DecodePrepareCpu(
          {.compact = compact, .layout = spans_->layout(), .spans = cpu_spans.data()}, nullptr);
      ASSERT_TRUE(status.ok()) << status;
      for (size_t s = 0; s < n; ++s) {  // its queries are of no more use
        History& history = history_[Size(layer * kSequences) + s];
        history.q.resize(history.q.size() + heads_);
        for (size_t g = 0; g < kv_heads; ++g) {
          const size_t at = s * kv_heads + g;
          Remember(&history, &rows[at * row_bytes_], decisions[at]);
        }
      }
      DeviceArray<float> d_qkv(qkv), d_q(n * heads_);
      DeviceArray<int32_t> d_positions(positions);
      compact.q = d_qkv.get();
      compact.k = d_qkv.get() + heads_;
      compact.v = d_qkv.get() + heads_ + kv_;
      compact.q_norm = d_q_norm_->get();
      compact.k_norm = d_k_norm_->get();
      compact.positions = d_positions.get();
      compact.rope_cos = d_cos_->get();
      compact.rope_sin = d_sin_->get();
      compact.q_out = d_q.get();
      compact.rows = nullptr;
      compact.decisions = nullptr;
      status = LaunchDecodePrepare(
          {.compact = compact, .spans = spans_->device(), .slots = slots.get(), .layer = layer},
          nullptr);
      ASSERT_TRUE(status.ok()) << status;
    }
  }
}

}  // namespace winnow::kernels
