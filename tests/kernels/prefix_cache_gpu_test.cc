// A prefill in chunks by way of the cache: LaunchPrefixLoad, the prefill's ops and
// LaunchCacheAppend against SpanToken(), DmsCompactCpu and AdvanceSpan(), then decode steps
// that go on from it. What is stored is equal bit for bit after every chunk.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>

#include "kernels/cuda/decode_prepare.h"
#include "kernels/cuda/dms_prepare.h"
#include "kernels/cuda/prefix_cache.h"
#include "kernels/decode_prepare.h"
#include "kernels/dms_prefill_attention.h"
#include "kernels/rope.h"
#include "tests/kernels/device_span_case.h"

namespace winnow::kernels {
namespace {

constexpr size_t Size(int n) { return static_cast<size_t>(n); }
constexpr int kLayers = 2, kSequences = 3, kMaxTokens = 400;

struct CacheCase {
  std::string name;
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 128, group = 2, num_kv_heads = 2, window = 20, shift = 1;
  DecisionRule rule = {
      .source = DecisionSource::kBorrowedAfterQNorm, .scale = 1.0f, .offset = 0.3f};
  // [round][sequence of the cache]: tokens of its chunk; 0: not in the batch.
  std::vector<std::vector<int>> rounds = {{70, 1, 21}, {131, 0, 1}, {1, 40, 20}, {3, 150, 2}};
  friend void PrintTo(const CacheCase& c, std::ostream* os) { *os << c.name; }
};

// What a sequence has seen in one layer, for attention over all of it at once.
struct History {
  std::vector<Bf16> q, k, v;  // as attention reads them
  std::vector<uint8_t> decisions;
};

class PrefixCacheGpu : public testing::TestWithParam<CacheCase> {
 protected:
  void SetUp() override {
    RequireGpu();
    if (!IsSkipped() && !HasFatalFailure()) Build();
  }

  void Build() {
    const CacheCase& c = GetParam();
    slots_per_page_ = SlotsPerPage(c.format, c.head_dim);
    const int num_spans = kLayers * kSequences * c.num_kv_heads;
    num_pages_ = num_spans * (2 * kMaxTokens / slots_per_page_ + 2);
    spans_ = std::make_unique<DeviceSpanCase>(DeviceSpanShape{.format = c.format,
                                                              .head_dim = c.head_dim,
                                                              .window = c.window,
                                                              .shift = c.shift,
                                                              .num_layers = kLayers,
                                                              .num_kv_heads = c.num_kv_heads,
                                                              .spare_pages = num_pages_,
                                                              .max_survivors = kMaxTokens},
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
    absl::StatusOr<RopeTable> rope = BuildRopeTable(c.head_dim, kMaxTokens, 10000.0f);
    ASSERT_TRUE(rope.ok());
    rope_ = *rope;
    d_q_norm_ = std::make_unique<DeviceArray<float>>(q_norm_);
    d_k_norm_ = std::make_unique<DeviceArray<float>>(k_norm_);
    d_cos_ = std::make_unique<DeviceArray<float>>(rope_.cos);
    d_sin_ = std::make_unique<DeviceArray<float>>(rope_.sin);
    history_.resize(Size(kLayers * kSequences));
  }

  std::vector<float> Random(size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (float& value : x) value = normal(rng_);
    return x;
  }

  DevicePagePool pool() const { return {free_pages_->get(), num_free_->get(), exhausted_->get()}; }

  DmsCompactParams CpuParams(const float* qkv, const int32_t* positions, int n) const {
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
            .num_positions = kMaxTokens,
            .rule = c.rule,
            .format = c.format,
            .num_tokens = n,
            .num_heads = c.num_kv_heads * c.group,
            .num_kv_heads = c.num_kv_heads,
            .head_dim = c.head_dim};
  }

  void AttachPages(Span* span, const PageNeed& need) {
    for (int i = 0; i < need.ring; ++i, cpu_free_.pop_back()) {
      spans_->AddPage(&span->ring, cpu_free_.back());
    }
    for (int i = 0; i < need.survivors; ++i, cpu_free_.pop_back()) {
      spans_->AddPage(&span->survivors, cpu_free_.back());
    }
  }

  void RunRound(const std::vector<int>& tokens);
  void RunLayer(int layer, const std::vector<int>& tokens);
  void CheckAttention(int layer, int sequence, const std::vector<Bf16>& out);
  void CheckCache(const std::string& when);
  void DecodeSteps(int steps);

  std::mt19937 rng_{11};
  int slots_per_page_ = 0, num_pages_ = 0;
  size_t dim_ = 0, kv_ = 0, heads_ = 0, row_ = 0, row_bytes_ = 0;
  std::unique_ptr<DeviceSpanCase> spans_;
  std::vector<int32_t> cpu_free_;
  std::unique_ptr<DeviceArray<int32_t>> free_pages_, num_free_, exhausted_;
  std::vector<float> q_norm_, k_norm_;
  RopeTable rope_;
  std::unique_ptr<DeviceArray<float>> d_q_norm_, d_k_norm_, d_cos_, d_sin_;
  std::vector<History> history_;  // [layer, sequence]
};

// One chunk of each sequence that has tokens, through a layer of device and CPU; a sequence
// of no cache is in the batch too.
void PrefixCacheGpu::RunLayer(int layer, const std::vector<int>& tokens) {
  const CacheCase& c = GetParam();
  constexpr int kStray = 5;  // tokens of the sequence of no cache
  const int batch_window = std::max(c.window, 1);
  const size_t kv_heads = Size(c.num_kv_heads);
  std::vector<DmsPrefillSequence> places;
  std::vector<int32_t> slots, positions;
  int band = 0, compact = 0, max_band = 0;
  for (int s = kSequences; s >= 0; --s) {  // the last is the stray
    const int n = s == kSequences ? kStray : tokens[Size(s)];
    if (n == 0) continue;
    const int before = s == kSequences ? 0 : spans_->span(layer, s, 0).num_tokens;
    const int prefix = std::min(c.window + 1, before);
    places.push_back({static_cast<int32_t>(positions.size()), n, band, prefix, compact});
    slots.push_back(s == kSequences ? -1 : s);
    for (int t = 0; t < n; ++t) positions.push_back(before + t);
    band += prefix + n + 8;
    compact += before + n + 8;
    max_band = std::max(max_band, prefix + n);
  }
  const int rows = static_cast<int>(positions.size()), batch_size = static_cast<int>(slots.size());
  std::vector<Bf16> qkv(Size(rows) * row_);
  const std::vector<float> values = Random(qkv.size());
  for (size_t i = 0; i < qkv.size(); ++i) qkv[i] = ToBf16(1.3f * values[i]);

  DeviceArray<DmsPrefillSequence> d_places(places);
  DeviceArray<int32_t> d_slots(slots), d_positions(positions);
  DeviceArray<int32_t> num_survivors(Size(batch_size) * kv_heads);
  DeviceArray<Bf16> d_qkv(qkv), q_out(Size(rows) * heads_), out(Size(rows) * heads_);
  DeviceArray<Bf16> band_k(Size(band) * kv_), band_v(Size(band) * kv_);
  DeviceArray<Bf16> compact_k(Size(compact) * kv_), compact_v(Size(compact) * kv_);
  DeviceArray<uint8_t> prefix_evict(Size(band) * kv_heads), decisions(Size(rows) * kv_heads),
      flat(Size(rows) * kv_heads * row_bytes_);
  DmsPrefillBatch batch{.sequences = d_places.get(),
                        .num_survivors = num_survivors.get(),
                        .band_k = band_k.get(),
                        .band_v = band_v.get(),
                        .compact_k = compact_k.get(),
                        .compact_v = compact_v.get(),
                        .batch = batch_size,
                        .num_kv_heads = c.num_kv_heads,
                        .group = c.group,
                        .head_dim = c.head_dim,
                        .window = batch_window,
                        .shift = c.shift,
                        .num_rows = rows,
                        .band_rows = band,
                        .compact_rows = compact,
                        .max_band = max_band};
  DeviceArray<uint8_t> scratch(DmsPrefillScratchBytes(batch));
  batch.scratch = scratch.get();
  absl::Status status = LaunchPrefixLoad({.batch = batch,
                                          .spans = spans_->device(),
                                          .slots = d_slots.get(),
                                          .layer = layer,
                                          .num_survivors = num_survivors.get(),
                                          .prefix_evict = prefix_evict.get()},
                                         nullptr);
  ASSERT_TRUE(status.ok()) << status;
  const std::vector<Bf16> loaded_band_k = band_k.Get(), loaded_band_v = band_v.Get();
  const std::vector<Bf16> loaded_k = compact_k.Get(), loaded_v = compact_v.Get();
  const std::vector<uint8_t> loaded_evict = prefix_evict.Get();
  const std::vector<int32_t> loaded_count = num_survivors.Get();
  const int64_t stride = static_cast<int64_t>(row_);
  status = LaunchDmsPrepare({.batch = batch,
                             .format = c.format,
                             .q = d_qkv.get(),
                             .k = d_qkv.get() + heads_,
                             .v = d_qkv.get() + heads_ + kv_,
                             .q_stride = stride,
                             .kv_stride = stride,
                             .q_norm = d_q_norm_->get(),
                             .k_norm = d_k_norm_->get(),
                             .positions = d_positions.get(),
                             .rope_cos = d_cos_->get(),
                             .rope_sin = d_sin_->get(),
                             .rule = c.rule,
                             .q_out = q_out.get(),
                             .q_out_stride = static_cast<int64_t>(heads_),
                             .decisions = decisions.get(),
                             .rows = flat.get()},
                            nullptr);
  ASSERT_TRUE(status.ok()) << status;
  status = LaunchDmsPrefillCompact({.batch = batch,
                                    .format = c.format,
                                    .decisions = c.window == 0 ? nullptr : decisions.get(),
                                    .prefix_evict = prefix_evict.get()},
                                   nullptr);
  ASSERT_TRUE(status.ok()) << status;
  status = LaunchDmsPrefillAttention({.batch = batch,
                                      .q = q_out.get(),
                                      .q_stride = static_cast<int64_t>(heads_),
                                      .out = out.get(),
                                      .scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim))},
                                     nullptr);
  ASSERT_TRUE(status.ok()) << status;
  status = LaunchCacheAppend({.batch = batch,
                              .spans = spans_->device(),
                              .pool = pool(),
                              .slots = d_slots.get(),
                              .layer = layer,
                              .rows = flat.get()},
                             nullptr);
  ASSERT_TRUE(status.ok()) << status;
  const std::vector<Bf16> got_out = out.Get(), got_q = q_out.Get();

  std::vector<float> x(qkv.size()), cpu_q(Size(rows) * heads_);
  std::transform(qkv.begin(), qkv.end(), x.begin(), [](Bf16 value) { return ToFloat(value); });
  std::vector<uint8_t> cpu_rows(Size(rows) * kv_heads * row_bytes_),
      cpu_decisions(Size(rows) * kv_heads);
  DmsCompactParams cpu = CpuParams(x.data(), positions.data(), rows);
  cpu.q_out = cpu_q.data();
  cpu.rows = cpu_rows.data();
  cpu.decisions = cpu_decisions.data();
  status = DmsCompactCpu(cpu, nullptr);
  ASSERT_TRUE(status.ok()) << status;
  const KvLayout layout = spans_->layout();
  std::vector<float> k(dim_), v(dim_);
  const auto load = [&](const TokenRef& token) {
    LoadK(c.format, c.head_dim, token, k.data());
    LoadV(c.format, c.head_dim, token, v.data());
  };
  const auto same = [](const std::vector<float>& want, const Bf16* got) {
    return std::equal(want.begin(), want.end(), got,
                      [](float a, Bf16 b) { return ToBf16(a) == b; });
  };
  for (size_t n = 0; n < places.size(); ++n) {
    const DmsPrefillSequence& at = places[n];
    SCOPED_TRACE("layer " + std::to_string(layer) + " sequence " + std::to_string(slots[n]));
    if (slots[n] < 0) {
      for (size_t g = 0; g < kv_heads; ++g) ASSERT_EQ(loaded_count[n * kv_heads + g], 0);
      continue;
    }
    History& history = history_[Size(layer * kSequences + slots[n])];
    for (size_t g = 0; g < kv_heads; ++g) {
      Span& span = spans_->span(layer, slots[n], static_cast<int>(g));
      ASSERT_EQ(loaded_count[n * kv_heads + g], span.num_survivors);
      for (int i = 0; i < span.num_live(); ++i) {
        load(SpanToken(layout, span, i));
        const int in_band = i - span.num_survivors;
        const size_t to = in_band < 0 ? (g * Size(compact) + Size(at.compact_row + i)) * dim_
                                      : Size(at.band_row + in_band) * kv_ + g * dim_;
        ASSERT_TRUE(same(k, (in_band < 0 ? loaded_k : loaded_band_k).data() + to)) << i;
        ASSERT_TRUE(same(v, (in_band < 0 ? loaded_v : loaded_band_v).data() + to)) << i;
        if (in_band < 0 || (c.shift == 1 && in_band + 1 == at.num_prefix)) continue;
        const int slot = span.ring_start + in_band;
        const uint8_t evict =
            in_band == span.num_ring ? span.newest_evict : span.ring_evict[slot % c.window];
        ASSERT_EQ(loaded_evict[Size(at.band_row + in_band) * kv_heads + g], evict) << i;
      }
      AttachPages(&span,
                  CountPageNeed(layout, span, at.num_tokens,
                                &cpu_decisions[Size(at.row) * kv_heads + g], c.num_kv_heads));
      for (int t = 0; t < at.num_tokens; ++t) {
        const size_t i = Size(at.row + t) * kv_heads + g;
        AdvanceSpan(layout, &span, &cpu_rows[i * row_bytes_], cpu_decisions[i]);
      }
    }
    for (size_t i = Size(at.row) * kv_heads; i < Size(at.row + at.num_tokens) * kv_heads; ++i) {
      load(RowToken(c.format, c.head_dim, &cpu_rows[i * row_bytes_]));
      for (const float value : k) history.k.push_back(ToBf16(value));
      for (const float value : v) history.v.push_back(ToBf16(value));
      history.decisions.push_back(cpu_decisions[i]);
    }
    const auto* q = &got_q[Size(at.row) * heads_];
    for (size_t i = 0; i < Size(at.num_tokens) * heads_; ++i) {
      ASSERT_EQ(q[i], ToBf16(cpu_q[Size(at.row) * heads_ + i]));
      history.q.push_back(q[i]);
    }
    const auto first = got_out.begin() + static_cast<int64_t>(Size(at.row) * heads_);
    CheckAttention(layer, slots[n],
                   {first, first + static_cast<int64_t>(Size(at.num_tokens) * heads_)});
  }
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

// All sequences, a token a step.
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
          std::vector<float> k(dim_), v(dim_);
          const TokenRef token =
              RowToken(c.format, c.head_dim, &rows[(s * kv_heads + g) * row_bytes_]);
          LoadK(c.format, c.head_dim, token, k.data());
          LoadV(c.format, c.head_dim, token, v.data());
          for (const float value : k) history.k.push_back(ToBf16(value));
          for (const float value : v) history.v.push_back(ToBf16(value));
          history.decisions.push_back(decisions[s * kv_heads + g]);
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

TEST_P(PrefixCacheGpu, ChunksThenStepsHaveTheCpusCache) {
  const CacheCase& c = GetParam();
  for (size_t round = 0; round < c.rounds.size(); ++round) {
    for (int layer = 0; layer < kLayers; ++layer) {
      ASSERT_NO_FATAL_FAILURE(RunLayer(layer, c.rounds[round]));
    }
    ASSERT_NO_FATAL_FAILURE(CheckCache("after chunk " + std::to_string(round)));
  }
  ASSERT_NO_FATAL_FAILURE(DecodeSteps(2 * std::min(c.window, 15) + 3));
  ASSERT_NO_FATAL_FAILURE(CheckCache("after the steps"));
  ASSERT_NO_FATAL_FAILURE(RunLayer(0, {5, 0, 30}));  // and chunks again
  ASSERT_NO_FATAL_FAILURE(CheckCache("after the last chunk"));
  EXPECT_EQ(exhausted_->Get()[0], 0);
}

TEST_P(PrefixCacheGpu, ASpanWithoutPagesStays) {
  const CacheCase& c = GetParam();
  if (c.name == "evict_all") return;  // needs no page
  ASSERT_NO_FATAL_FAILURE(RunLayer(0, c.rounds[0]));
  ASSERT_NO_FATAL_FAILURE(CheckCache("before"));
  const std::vector<SpanState> before = spans_->state->Get();
  const std::vector<uint8_t> pages = spans_->pages->Get(), newest = spans_->newest->Get();
  const int left = num_free_->Get()[0];
  num_free_->Set({0});
  // The CPU goes on, the device may not.
  std::vector<int> tokens(kSequences, 0);
  tokens[0] = 200;
  RunLayer(0, tokens);
  const std::vector<SpanState> after = spans_->state->Get();
  EXPECT_EQ(exhausted_->Get()[0], 1);
  EXPECT_EQ(num_free_->Get()[0], 0);
  EXPECT_EQ(std::memcmp(before.data(), after.data(), before.size() * sizeof(SpanState)), 0);
  EXPECT_TRUE(pages == spans_->pages->Get() && newest == spans_->newest->Get());
  num_free_->Set({left});
}

std::vector<CacheCase> Cases() {
  std::vector<CacheCase> cases;
  for (const KvFormat& format : kKvFormats) {
    for (const int dim : {64, 128}) {
      cases.push_back({.name = std::string(format.name) + "_d" + std::to_string(dim),
                       .format = format.id,
                       .head_dim = dim});
    }
  }
  cases.push_back({.name = "shift0", .shift = 0});
  cases.push_back({.name = "w1", .window = 1});
  cases.push_back({.name = "w1_shift0", .window = 1, .shift = 0});
  cases.push_back({.name = "window_past_most", .window = 100});
  cases.push_back({.name = "many_heads", .head_dim = 64, .group = 3, .num_kv_heads = 5});
  cases.push_back(
      {.name = "evict_all",
       .rule = {.source = DecisionSource::kBorrowedAfterQNorm, .scale = 1.0f, .offset = -1e6f}});
  cases.push_back({.name = "keep_all", .rule = {.source = DecisionSource::kNone}});
  cases.push_back({.name = "dense", .window = 0, .rule = {.source = DecisionSource::kNone}});
  cases.push_back({.name = "token_by_token",
                   .window = 3,
                   .rounds = {{2, 1, 1}, {1, 1, 1}, {1, 2, 1}, {1, 1, 1}, {1, 1, 5}}});
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, PrefixCacheGpu, testing::ValuesIn(Cases()),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
