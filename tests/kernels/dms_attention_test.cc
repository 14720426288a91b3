// Both attention ops over the compact cache: against the closed form of the
// mask, against each other, and against facts.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "kernels/cpu/cpu_path.h"
#include "kernels/hadamard.h"
#include "tests/kernels/dms_case.h"

namespace winnow {
namespace {

using kernels::KvFormatId;

// out = sum p v / sum p. A dot over d terms of |q k| <= 6 errs by at most
// d * 2^-24 * sum |q k|, about 2e-5 at d = 128 after scaling; that is the
// relative error of p. |v| <= 5, so 1e-4 holds for every case below.
constexpr double kTolerance = 1e-4;

void ExpectNear(const std::vector<float>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], kTolerance) << "element " << i;
  }
}

std::vector<DmsCase> RandomCases() {
  std::vector<DmsCase> cases = {
      {.name = "window_64_d64",
       .num_tokens = 300,
       .window = 64,
       .evict_rate = 0.7,
       .num_heads = 9,
       .num_kv_heads = 3,
       .head_dim = 64},
      {.name = "window_600_d16", .num_tokens = 700, .window = 600, .evict_rate = 0.9},
      {.name = "d128_bf16",
       .num_tokens = 150,
       .window = 31,
       .format = KvFormatId::kBf16,
       .num_heads = 8,
       .num_kv_heads = 2,
       .head_dim = 128},
      {.name = "dense_fp8",
       .num_tokens = 200,
       .window = 0,
       .num_heads = 4,
       .num_kv_heads = 4,
       .head_dim = 32},
      {.name = "dense_bf16_d80",
       .num_tokens = 130,
       .window = 0,
       .format = KvFormatId::kBf16,
       .num_heads = 8,
       .num_kv_heads = 1,
       .head_dim = 80},
      {.name = "one_token", .num_tokens = 1, .window = 4},
      {.name = "shift0_w1", .num_tokens = 90, .window = 1, .shift = 0},
      {.name = "group_33", .num_tokens = 40, .window = 5, .num_heads = 33, .num_kv_heads = 1},
      {.name = "d128_int8h",
       .num_tokens = 150,
       .window = 31,
       .format = KvFormatId::kInt8H,
       .num_heads = 8,
       .num_kv_heads = 2,
       .head_dim = 128},
      {.name = "dense_k8v8_d96",
       .num_tokens = 130,
       .window = 0,
       .format = KvFormatId::kK8V8,
       .num_heads = 3,
       .num_kv_heads = 1,
       .head_dim = 96},
      {.name = "d256",
       .num_tokens = 50,
       .window = 7,
       .num_heads = 2,
       .num_kv_heads = 2,
       .head_dim = 256},
  };
  static_assert(std::size(kernels::kKvFormats) == 5);
  std::mt19937 rng(7);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
  };
  for (int i = 0; i < 24; ++i) {
    const int kv_heads = pick(1, 3);
    cases.push_back({.name = "random_" + std::to_string(i),
                     .num_tokens = pick(1, 220),
                     .window = i % 3 == 0 ? pick(1, 8) : pick(1, 150),
                     .shift = pick(0, 1),
                     .evict_rate = 0.1 * pick(1, 8),
                     .format = kernels::kKvFormats[i % 5].id,
                     .num_heads = kv_heads * pick(1, 5),
                     .num_kv_heads = kv_heads,
                     .head_dim = 16 * pick(1, 5),
                     .seed = static_cast<uint32_t>(100 + i)});
  }
  return cases;
}

class DmsAttention : public testing::TestWithParam<DmsCase> {};

TEST_P(DmsAttention, PrefillMatchesTheDenseMask) {
  const DmsInputs in(GetParam());
  ThreadPool pool(2);
  const std::vector<double> want = OracleAttention(in);
  std::mt19937 rng(in.c.seed);
  for (const int chunk :
       {in.c.num_tokens, std::uniform_int_distribution<int>(1, in.c.num_tokens)(rng)}) {
    auto cache = MakeCache(in.c);
    SequenceCache sequence = *cache->NewSequence();
    ExpectNear(Prefill(in, 0, in.c.num_tokens, chunk, &pool, &sequence, *cache), want);
  }
}

TEST_P(DmsAttention, DecodeGivesPrefillsBits) {
  const DmsInputs in(GetParam());
  ThreadPool pool(2);
  auto cache = MakeCache(in.c, 3);
  SequenceCache prefilled = *cache->NewSequence();
  SequenceCache decoded = *cache->NewSequence();
  SequenceCache both = *cache->NewSequence();
  const int n = in.c.num_tokens;
  const std::vector<float> want = Prefill(in, 0, n, n, &pool, &prefilled, *cache);
  EXPECT_EQ(Decode(in, 0, n, &pool, &decoded, *cache), want);
  std::vector<float> mixed = Prefill(in, 0, n / 2, 50, &pool, &both, *cache);
  const std::vector<float> rest = Decode(in, n / 2, n, &pool, &both, *cache);
  mixed.insert(mixed.end(), rest.begin(), rest.end());
  EXPECT_EQ(mixed, want);
}

TEST_P(DmsAttention, OnlyVisibleTokensAreHeld) {
  const DmsInputs in(GetParam());
  ThreadPool pool(1);
  auto cache = MakeCache(in.c);
  SequenceCache sequence = *cache->NewSequence();
  for (int t = 0; t < in.c.num_tokens; ++t) {
    Decode(in, t, t + 1, &pool, &sequence, *cache);
    for (int g = 0; g < in.c.num_kv_heads; ++g) {
      int visible = 0;
      for (int j = 0; j <= t; ++j) visible += OracleVisible(in, g, t, j) ? 1 : 0;
      ASSERT_EQ(sequence.live_tokens(0, g), visible) << "token " << t << " head " << g;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, DmsAttention, testing::ValuesIn(RandomCases()),
                         [](const auto& c) { return c.param.name; });

const DmsCase kLong = {.name = "long",
                       .num_tokens = 1200,
                       .window = 100,
                       .evict_rate = 0.6,
                       .num_heads = 6,
                       .num_kv_heads = 2,
                       .head_dim = 64};

TEST(DmsAttentionOrder, ChunksThreadsAndPagesChangeNoBit) {
  struct Layout {
    KvFormatId format;
    int window, shift;
  };
  struct Run {
    int threads, chunk;
    bool poison;  // and scrambled page ids
  };
  constexpr int kTokens = 700;
  for (const auto& [format, window, shift] :
       {Layout{KvFormatId::kFp8, 0, 1}, Layout{KvFormatId::kFp8, 100, 0},
        Layout{KvFormatId::kFp8, 100, 1}, Layout{KvFormatId::kBf16, 100, 1},
        Layout{KvFormatId::kInt8, 100, 0}, Layout{KvFormatId::kInt8H, 0, 1},
        Layout{KvFormatId::kInt8H, 100, 1}, Layout{KvFormatId::kK8V8, 100, 1}}) {
    DmsCase c = kLong;
    c.num_tokens = kTokens;
    c.format = format;
    c.window = window;
    c.shift = shift;
    const DmsInputs in(c);
    std::vector<float> want;
    std::vector<uint8_t> want_bytes;
    for (const Run& run : {Run{1, kTokens, false}, Run{1, kTokens, true}, Run{1, 512, true},
                           Run{2, 64, true}, Run{3, 64, true}, Run{1, 7, true}, Run{2, 1, true}}) {
      ThreadPool pool(run.threads);
      auto cache = MakeCache(c, 1, run.poison);
      SequenceCache sequence = *cache->NewSequence();
      const auto out = Prefill(in, 0, kTokens, run.chunk, &pool, &sequence, *cache);
      std::vector<uint8_t> bytes(sequence.ExportBytes(0));
      sequence.Export(0, bytes.data());
      if (want.empty()) {
        want = out;
        want_bytes = bytes;
      }
      EXPECT_EQ(out, want) << KvFormatName(format) << " " << run.threads << " threads, chunk "
                           << run.chunk;
      EXPECT_EQ(bytes, want_bytes)
          << KvFormatName(format) << " " << run.threads << " threads, chunk " << run.chunk;
    }
  }
}

TEST(DmsAttentionOrder, BatchMatesChangeNoBit) {
  const DmsInputs in(kLong);
  ThreadPool pool(2);
  auto cache = MakeCache(in.c, 3);
  kernels::ThreadScratch scratch(2, kernels::AttentionScratchBytes(6, 2, 64, 2400));
  std::vector<SequenceCache> sequences;
  std::vector<float> q;
  std::vector<float> want;
  std::vector<const kernels::Span*> spans;
  for (const int length : {700, 1, 1200}) {
    sequences.push_back(*cache->NewSequence());
    if (length > 1) Prefill(in, 0, length - 1, 512, &pool, &sequences.back(), *cache);
    const auto out = Decode(in, length - 1, length, &pool, &sequences.back(), *cache);
    want.insert(want.end(), out.begin(), out.end());
    const auto from = in.q.begin() + (length - 1) * 6 * 64;
    q.insert(q.end(), from, from + 6 * 64);
  }
  for (const SequenceCache& sequence : sequences) spans.push_back(sequence.spans(0));
  std::vector<float> out(want.size(), NAN);
  ASSERT_TRUE(kernels::CompactDecodeAttentionCpu({.layout = cache->layout(),
                                                  .spans = spans.data(),
                                                  .q = q.data(),
                                                  .out_f32 = out.data(),
                                                  .num_seqs = 3,
                                                  .num_heads = 6,
                                                  .num_kv_heads = 2,
                                                  .scale = in.scale(),
                                                  .scratch = &scratch},
                                                 &pool)
                  .ok());
  EXPECT_EQ(out, want);
}

// The documented order in plain scalar code. Bits agree where the vector code
// has fused multiply-adds.
float PlainExp(float x) {
  if (x < -87.0f) return 0.0f;
  const float n = std::nearbyint(x * 1.44269504088896341f);
  float r = std::fma(-n, 0.693359375f, x);
  r = std::fma(-n, -2.12194440e-4f, r);
  float y = 1.9875691500e-4f;
  for (const float a :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    y = std::fma(y, r, a);
  }
  y = std::fma(y, r * r, r) + 1.0f;
  return y * std::ldexp(1.0f, static_cast<int>(n));
}

TEST(DmsAttentionOrder, IsTheDocumentedOne) {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    GTEST_SKIP() << "no fused multiply-add in the vector code";
  }
#endif
  DmsCase c = kLong;
  c.num_tokens = 260;
  for (const auto& [format, name, k_element, v_element, rotated] : kernels::kKvFormats) {
    c.format = format;
    const DmsInputs in(c);
    ThreadPool pool(2);
    auto cache = MakeCache(c);
    SequenceCache sequence = *cache->NewSequence();
    const auto got = Prefill(in, 0, c.num_tokens, 100, &pool, &sequence, *cache);
    const size_t dim = static_cast<size_t>(c.head_dim);
    for (int i = 0; i < c.num_tokens; ++i) {
      for (int h = 0; h < c.num_heads; ++h) {
        const size_t at = static_cast<size_t>(i * c.num_heads + h) * dim;
        const int g = h / 3;
        std::vector<float> x(dim), out(dim, 0.0f), score;
        std::vector<int> keys;
        for (int j = 0; j <= i; ++j) {
          if (!OracleVisible(in, g, i, j)) continue;
          LoadK(format, c.head_dim, RowToken(format, c.head_dim, in.row(j, g)), x.data());
          float dot = 0.0f;
          for (size_t d = 0; d < dim; ++d) dot = std::fma(in.q[at + d], x[d], dot);
          keys.push_back(j);
          score.push_back(dot * in.scale());
        }
        const float max = *std::max_element(score.begin(), score.end());
        float sum = 0.0f;
        for (size_t n = 0; n < keys.size(); ++n) {
          LoadV(format, c.head_dim, RowToken(format, c.head_dim, in.row(keys[n], g)), x.data());
          const float p = PlainExp(score[n] - max);
          sum += p;
          for (size_t d = 0; d < dim; ++d) out[d] = std::fma(p, x[d], out[d]);
        }
        for (float& value : out) value /= sum;
        if (rotated) kernels::HadamardRotate(c.head_dim, out.data());
        for (size_t d = 0; d < dim; ++d) {
          ASSERT_EQ(got[at + d], out[d]) << name << " token " << i << " head " << h << " dim " << d;
        }
      }
    }
  }
}

TEST(DmsAttentionOrder, VectorWidthChangesNoBit) {
  const kernels::CpuPath widest = kernels::ActiveCpuPath();
  for (const kernels::KvFormat& format : kernels::kKvFormats) {
    for (const int head_dim : {16, 48, 64, 96}) {
      DmsCase c = kLong;
      c.num_tokens = 150;
      c.window = 20;
      c.format = format.id;
      c.head_dim = head_dim;
      const DmsInputs in(c);
      ThreadPool pool(1);
      auto cache = MakeCache(c);
      const auto run = [&] {
        SequenceCache sequence = *cache->NewSequence();
        return Prefill(in, 0, c.num_tokens, 70, &pool, &sequence, *cache);
      };
      const auto want = run();
      if (kernels::SetCpuPathForTest(kernels::CpuPath::kAvx2)) {
        EXPECT_EQ(run(), want);
      }
      ASSERT_TRUE(kernels::SetCpuPathForTest(kernels::CpuPath::kScalar));
      ExpectNear(run(), OracleAttention(in));
      ASSERT_TRUE(kernels::SetCpuPathForTest(widest));
    }
  }
}

TEST(DmsAttentionFacts, AllKeptIsCausal) {
  DmsCase c = kLong;
  c.evict_rate = 0.0;
  const DmsInputs in(c);
  ThreadPool pool(2);
  auto dms = MakeCache(c);
  SequenceCache dms_sequence = *dms->NewSequence();
  c.window = 0;
  auto dense = MakeCache(c);
  SequenceCache dense_sequence = *dense->NewSequence();
  EXPECT_EQ(Prefill(in, 0, c.num_tokens, 300, &pool, &dms_sequence, *dms),
            Prefill(in, 0, c.num_tokens, 300, &pool, &dense_sequence, *dense));
}

TEST(DmsAttentionFacts, AllEvictedIsASlidingWindow) {
  DmsCase c = kLong;
  c.evict_rate = 1.0;
  const DmsInputs in(c);
  ThreadPool pool(2);
  auto cache = MakeCache(c);
  SequenceCache sequence = *cache->NewSequence();
  const auto out = Prefill(in, 0, c.num_tokens, c.num_tokens, &pool, &sequence, *cache);
  EXPECT_EQ(sequence.live_tokens(0, 0), c.window + 1);
  // The last token sees what a fresh dense sequence of the last W + 1 tokens holds.
  DmsCase dense = c;
  dense.window = 0;
  auto short_cache = MakeCache(dense);
  SequenceCache tail = *short_cache->NewSequence();
  const int begin = c.num_tokens - c.window - 1;
  const auto want = Prefill(in, begin, c.num_tokens, c.num_tokens, &pool, &tail, *short_cache);
  const std::vector<float> got_last(out.end() - 6 * 64, out.end());
  const std::vector<float> want_last(want.end() - 6 * 64, want.end());
  EXPECT_EQ(got_last, want_last);
}

TEST(DmsAttentionFacts, OneLiveTokenGivesItsValue) {
  const DmsInputs in({.name = "one",
                      .num_tokens = 1,
                      .window = 3,
                      .num_heads = 2,
                      .num_kv_heads = 1,
                      .head_dim = 32});
  ThreadPool pool(1);
  auto cache = MakeCache(in.c);
  SequenceCache sequence = *cache->NewSequence();
  const auto out = Decode(in, 0, 1, &pool, &sequence, *cache);
  float v[32];
  LoadV(in.c.format, 32, kernels::RowToken(in.c.format, 32, in.row(0, 0)), v);
  for (int i = 0; i < 64; ++i) EXPECT_EQ(out[static_cast<size_t>(i)], v[i % 32]);
}

// A masked key would add 0 * NaN: behind the window of a whole tile an evicted key
// is not even computed, in the chunk as in the cache.
TEST(DmsAttentionFacts, EvictedKeysAreNotComputed) {
  DmsCase c = kLong;
  c.num_tokens = 400;
  c.evict_rate = 1.0;
  DmsInputs in(c);
  ThreadPool pool(2);
  std::vector<float> nan(64, std::numeric_limits<float>::quiet_NaN());
  StoreRow(c.format, 64, nan.data(), nan.data(), const_cast<uint8_t*>(in.row(5, 1)));
  for (const int chunk : {400, 64}) {
    auto cache = MakeCache(c);
    SequenceCache sequence = *cache->NewSequence();
    const auto out = Prefill(in, 0, 400, chunk, &pool, &sequence, *cache);
    for (size_t i = out.size() - 6 * 64; i < out.size(); ++i) EXPECT_FALSE(std::isnan(out[i]));
    EXPECT_TRUE(std::isnan(out[5 * 6 * 64 + 3 * 64]));  // token 5 itself, KV head 1
  }
}

TEST(DmsAttentionErrors, SmallScratchAndBadShapesAreRefused) {
  const DmsInputs in(kLong);
  auto cache = MakeCache(in.c);
  SequenceCache sequence = *cache->NewSequence();
  kernels::ThreadScratch small(1, 1000);
  std::vector<float> out(in.q.size());
  kernels::DmsPrefillAttentionParams p = {.layout = cache->layout(),
                                          .spans = sequence.spans(0),
                                          .q = in.q.data(),
                                          .rows = in.rows.data(),
                                          .out_f32 = out.data(),
                                          .num_tokens = 10,
                                          .num_heads = 6,
                                          .num_kv_heads = 2,
                                          .scale = 1.0f,
                                          .scratch = &small};
  EXPECT_EQ(DmsPrefillAttentionCpu(p, nullptr).code(), absl::StatusCode::kInvalidArgument);
  kernels::ThreadScratch enough(1, kernels::AttentionScratchBytes(6, 2, 64, 10));
  p.scratch = &enough;
  EXPECT_TRUE(DmsPrefillAttentionCpu(p, nullptr).ok());
  p.num_heads = 5;
  EXPECT_EQ(DmsPrefillAttentionCpu(p, nullptr).code(), absl::StatusCode::kInvalidArgument);
  p.num_heads = 6;
  p.layout.head_dim = 24;
  EXPECT_EQ(DmsPrefillAttentionCpu(p, nullptr).code(), absl::StatusCode::kUnimplemented);
  const kernels::Span* const batch[] = {sequence.spans(0)};
  const kernels::CompactDecodeAttentionParams empty = {.layout = cache->layout(),
                                                       .spans = batch,
                                                       .q = in.q.data(),
                                                       .out_f32 = out.data(),
                                                       .num_seqs = 1,
                                                       .num_heads = 6,
                                                       .num_kv_heads = 2,
                                                       .scale = 1.0f,
                                                       .scratch = &enough};
  EXPECT_EQ(CompactDecodeAttentionCpu(empty, nullptr).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace winnow
