// A prefill in chunks by way of the cache: LaunchPrefixLoad, the prefill's ops and
// LaunchCacheAppend against SpanToken(), DmsCompactCpu and AdvanceSpan(), then decode steps
// that go on from it. What is stored is equal bit for bit after every chunk.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cuda/dms_prepare.h"
#include "kernels/cuda/prefix_cache.h"
#include "tests/kernels/prefix_cache_case.h"
#include "tests/kernels/random_shapes.h"
#include "tests/kernels/valid_device_spans.h"
#include "tests/kernels/valid_prefill_batch.h"

namespace winnow::kernels {

ChunkBatch PrefixCacheGpu::MakeBatch(int layer, const std::vector<int>& tokens) {
  const CacheCase& c = GetParam();
  constexpr int kStrayTokens = 5;  // of each sequence of no cache
  ChunkBatch chunks;
  for (int s = kSequences + c.strays - 1; s >= 0; --s) {
    const bool stray = s >= kSequences;
    const int n = stray ? kStrayTokens : tokens[Size(s)];
    if (n == 0) continue;
    const int before = stray ? 0 : spans_->span(layer, s, 0).num_tokens;
    const int prefix = std::min(c.window + 1, before);
    chunks.places.push_back({chunks.rows, n, chunks.band, prefix, chunks.compact});
    chunks.slots.push_back(stray ? -1 : s);
    for (int t = 0; t < n; ++t) chunks.positions.push_back(before + t);
    chunks.rows += n;
    chunks.band += prefix + n + 8;
    chunks.compact += before + n + 8;
    chunks.max_band = std::max(chunks.max_band, prefix + n);
  }
  for (const float value : Random(Size(chunks.rows) * row_)) {
    chunks.qkv.push_back(ToBf16(1.3f * value));
  }
  return chunks;
}

void PrefixCacheGpu::RunOnDevice(int layer, const ChunkBatch& chunks, ChunkResult* result) {
  const CacheCase& c = GetParam();
  const int rows = chunks.rows, band = chunks.band, compact = chunks.compact;
  const int batch_size = static_cast<int>(chunks.slots.size());
  const size_t kv_heads = Size(c.num_kv_heads);
  DeviceArray<DmsPrefillSequence> d_places(chunks.places);
  DeviceArray<int32_t> d_slots(chunks.slots), d_positions(chunks.positions);
  DeviceArray<int32_t> num_survivors(Size(batch_size) * kv_heads);
  DeviceArray<Bf16> d_qkv(chunks.qkv), q_out(Size(rows) * heads_), out(Size(rows) * heads_);
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
                        .window = std::max(c.window, 1),
                        .shift = c.shift,
                        .num_rows = rows,
                        .band_rows = band,
                        .compact_rows = compact,
                        .max_band = chunks.max_band};
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
  result->band_k = band_k.Get();
  result->band_v = band_v.Get();
  result->compact_k = compact_k.Get();
  result->compact_v = compact_v.Get();
  result->prefix_evict = prefix_evict.Get();
  result->num_survivors = num_survivors.Get();
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
  result->q = q_out.Get();
  result->out = out.Get();
}

// What was loaded of one span, which has not advanced yet.
void PrefixCacheGpu::CheckLoaded(const ChunkBatch& chunks, const ChunkResult& result, size_t n,
                                 int g, const Span& span) {
  const CacheCase& c = GetParam();
  const DmsPrefillSequence& at = chunks.places[n];
  const size_t head = Size(g), kv_heads = Size(c.num_kv_heads);
  ASSERT_EQ(result.num_survivors[n * kv_heads + head], span.num_survivors);
  std::vector<float> k(dim_), v(dim_);
  const auto same = [](const std::vector<float>& want, const Bf16* got) {
    return std::equal(want.begin(), want.end(), got,
                      [](float a, Bf16 b) { return ToBf16(a) == b; });
  };
  for (int i = 0; i < span.num_live(); ++i) {
    const TokenRef token = SpanToken(spans_->layout(), span, i);
    LoadK(c.format, c.head_dim, token, k.data());
    LoadV(c.format, c.head_dim, token, v.data());
    const int in_band = i - span.num_survivors;
    if (in_band < 0) {
      const size_t to = (head * Size(chunks.compact) + Size(at.compact_row + i)) * dim_;
      ASSERT_TRUE(same(k, &result.compact_k[to]) && same(v, &result.compact_v[to])) << i;
      continue;
    }
    const size_t row = Size(at.band_row + in_band), to = row * kv_ + head * dim_;
    ASSERT_TRUE(same(k, &result.band_k[to]) && same(v, &result.band_v[to])) << i;
    if (c.shift == 1 && in_band + 1 == at.num_prefix) continue;  // its bit comes with the chunk
    const uint8_t evict = in_band == span.num_ring
                              ? span.newest_evict
                              : span.ring_evict[(span.ring_start + in_band) % c.window];
    ASSERT_EQ(result.prefix_evict[row * kv_heads + head], evict) << i;
  }
}

void PrefixCacheGpu::RunOnCpu(int layer, const ChunkBatch& chunks, const ChunkResult& result) {
  const CacheCase& c = GetParam();
  const size_t kv_heads = Size(c.num_kv_heads), rows = Size(chunks.rows);
  std::vector<float> qkv(chunks.qkv.size()), q(rows * heads_);
  std::transform(chunks.qkv.begin(), chunks.qkv.end(), qkv.begin(), ToFloat);
  std::vector<uint8_t> flat(rows * kv_heads * row_bytes_), decisions(rows * kv_heads);
  DmsCompactParams compact = CpuParams(qkv.data(), chunks.positions.data(), chunks.rows);
  compact.q_out = q.data();
  compact.rows = flat.data();
  compact.decisions = decisions.data();
  const absl::Status status = DmsCompactCpu(compact, nullptr);
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < q.size(); ++i) ASSERT_EQ(result.q[i], ToBf16(q[i]));
  for (size_t n = 0; n < chunks.places.size(); ++n) {
    const DmsPrefillSequence& at = chunks.places[n];
    const int sequence = chunks.slots[n];
    SCOPED_TRACE("layer " + std::to_string(layer) + " sequence " + std::to_string(sequence));
    if (sequence < 0) {
      for (size_t g = 0; g < kv_heads; ++g) {
        ASSERT_EQ(result.num_survivors[n * kv_heads + g], 0);
      }
      continue;
    }
    const size_t first = Size(at.row) * kv_heads, end = Size(at.row + at.num_tokens) * kv_heads;
    for (int g = 0; g < c.num_kv_heads; ++g) {
      Span& span = spans_->span(layer, sequence, g);
      ASSERT_NO_FATAL_FAILURE(CheckLoaded(chunks, result, n, g, span));
      AttachPages(&span, CountPageNeed(spans_->layout(), span, at.num_tokens,
                                       &decisions[first + Size(g)], c.num_kv_heads));
      for (size_t i = first + Size(g); i < end; i += kv_heads) {
        AdvanceSpan(spans_->layout(), &span, &flat[i * row_bytes_], decisions[i]);
      }
    }
    History& history = history_[Size(layer * kSequences + sequence)];
    for (size_t i = first; i < end; ++i) Remember(&history, &flat[i * row_bytes_], decisions[i]);
    const auto cut = [&](const std::vector<Bf16>& x) {
      const auto from = x.begin() + static_cast<int64_t>(Size(at.row) * heads_);
      return std::vector<Bf16>(from, from + static_cast<int64_t>(Size(at.num_tokens) * heads_));
    };
    const std::vector<Bf16> queries = cut(result.q);
    history.q.insert(history.q.end(), queries.begin(), queries.end());
    CheckAttention(layer, sequence, cut(result.out));
  }
}

void PrefixCacheGpu::RunLayer(int layer, const std::vector<int>& tokens) {
  const ChunkBatch chunks = MakeBatch(layer, tokens);
  ChunkResult result;
  ASSERT_NO_FATAL_FAILURE(RunOnDevice(layer, chunks, &result));
  ASSERT_NO_FATAL_FAILURE(RunOnCpu(layer, chunks, result));
}

namespace {

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

// Needs no device.
TEST(PrefixCacheParams, AFormatOutOfRangeIsRefused) {
  alignas(256) static uint8_t memory[256];
  auto* ints = reinterpret_cast<int32_t*>(memory);
  const DmsPrefillBatch batch = ValidPrefillBatch(memory);
  const DeviceSpans spans = ValidDeviceSpans(memory);
  PrefixLoadParams load{
      .batch = batch, .spans = spans, .slots = ints, .num_survivors = ints, .prefix_evict = memory};
  CacheAppendParams append{
      .batch = batch, .spans = spans, .pool = {ints, ints, ints}, .slots = ints, .rows = memory};
  for (const KvFormat& format : kKvFormats) {
    load.spans.format = append.spans.format = format.id;
    EXPECT_TRUE(ValidatePrefixLoad(load).ok()) << ValidatePrefixLoad(load);
    EXPECT_TRUE(ValidateCacheAppend(append).ok()) << ValidateCacheAppend(append);
  }
  for (const size_t bad : {std::size(kKvFormats), size_t{255}}) {
    load.spans.format = append.spans.format = static_cast<KvFormatId>(bad);
    const std::string format = "format=" + std::to_string(bad);
    const auto refused = [](const std::string& message) {
      return absl::InvalidArgumentError(message);
    };
    EXPECT_EQ(ValidatePrefixLoad(load), refused("prefix_load: " + format));
    EXPECT_EQ(LaunchPrefixLoad(load, nullptr), refused("prefix_load: " + format));
    EXPECT_EQ(ValidateCacheAppend(append), refused("cache_append: " + format));
    EXPECT_EQ(LaunchCacheAppend(append, nullptr), refused("cache_append: " + format));
  }
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

// Chunks of which thousands of tokens enter the ring and leave it again: many blocks of
// AppendTokensKernel have such tokens, a span takes far more than 32 pages at once, and the strays
// leave LaunchPrefixLoad fewer blocks a span than the span has pages.
std::vector<CacheCase> LongCases() {
  std::vector<CacheCase> cases;
  for (const KvFormatId format : {KvFormatId::kFp8, KvFormatId::kBf16}) {
    for (const int dim : {64, 128}) {
      for (const int window : {256, 1024}) {
        for (const bool keep_all : {false, true}) {
          CacheCase c{.name = std::string(KvFormatOf(format).name) + "_d" + std::to_string(dim) +
                              "_w" + std::to_string(window) + (keep_all ? "_keep_all" : "_mixed"),
                      .format = format,
                      .head_dim = dim,
                      .group = 1,
                      .num_kv_heads = 1,
                      .window = window,
                      // Of the longest chunk's tokens 13 whole blocks leave the ring again.
                      .rounds = {{3001, 257, 1}, {13 * 256 + 1 + window, 3, 1537}},
                      .max_tokens = 8000,
                      .strays = 100};
          if (keep_all) c.rule = {.source = DecisionSource::kNone};
          cases.push_back(c);
        }
      }
    }
  }
  CacheCase heads = cases.front();
  heads.name += "_heads";
  heads.num_kv_heads = 2;
  heads.group = 2;
  heads.shift = 0;
  cases.push_back(heads);
  return cases;
}

std::vector<CacheCase> RandomCases() {
  RandomShapes shapes(1);
  std::vector<CacheCase> cases;
  for (int i = 0; i < 16; ++i) {
    CacheCase c{.name = "number_" + std::to_string(i),
                .format = shapes.Format(),
                .head_dim = shapes.HeadDim(),
                .group = shapes.Of({1, 2, 3, 4, 8}),
                .num_kv_heads = shapes.In(1, 3),
                .window = shapes.Window(),
                .shift = shapes.In(0, 1),
                .rule = shapes.Rule(),
                .rounds = {},
                .strays = shapes.In(0, 3)};
    if (c.rule.source == DecisionSource::kLogits) c.rule.source = DecisionSource::kNone;
    const int most = shapes.Of({5, 60, 300});
    int longest = 0;  // at most of all sequences together
    for (int round = shapes.In(1, 4); round > 0; --round) {
      std::vector<int> tokens = {shapes.Log(1, most), 0, shapes.Log(1, most)};
      if (!shapes.OneIn(3)) tokens[1] = std::min(500, c.window + shapes.In(0, 2));
      longest += *std::max_element(tokens.begin(), tokens.end());
      c.rounds.push_back(tokens);
    }
    c.max_tokens = longest + 210;  // the tests go on with 200 tokens
    cases.push_back(c);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Random, PrefixCacheGpu, testing::ValuesIn(RandomCases()),
                         [](const auto& c) { return c.param.name; });
INSTANTIATE_TEST_SUITE_P(Long, PrefixCacheGpu, testing::ValuesIn(LongCases()),
                         [](const auto& c) { return c.param.name; });
INSTANTIATE_TEST_SUITE_P(All, PrefixCacheGpu, testing::ValuesIn(Cases()),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
