// LaunchSample() against Sample(): the same tokens.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <ostream>
#include <random>
#include <vector>

#include "common/base/bf16.h"
#include "common/sampling/sampler.h"
#include "kernels/cuda/sample.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/random_shapes.h"

namespace winnow::kernels {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int32_t OnTheCpu(absl::Span<const float> logits, const SamplingParams& params,
                 const SampleKey& key) {
  const auto id = Sample(logits, params, key);
  if (id.ok()) return *id;
  if (id.status().code() == absl::StatusCode::kInvalidArgument) return kSampleBadParams;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] < kInf)) return SampleBadLogit(static_cast<int32_t>(i));
  }
  return kSampleAllMinusInfinity;
}

struct Rows {
  int vocab = 0;
  int64_t ld = 0;
  std::vector<float> logits;
  std::vector<SamplingParams> params;
  std::vector<SampleKey> keys;

  int size() const { return static_cast<int>(params.size()); }
  float* row(int r) { return logits.data() + r * ld; }
  std::vector<int32_t> Cpu() const {
    std::vector<int32_t> tokens(params.size());
    for (size_t r = 0; r < tokens.size(); ++r) {
      tokens[r] =
          OnTheCpu({logits.data() + static_cast<int64_t>(r) * ld, static_cast<size_t>(vocab)},
                   params[r], keys[r]);
    }
    return tokens;
  }
};

// What rows of logits look like: a model's, sharp, flat, with many equals, masked, far apart.
void Fill(std::mt19937& rng, int kind, int vocab, const std::vector<float>& normal, float* out) {
  const size_t offset = rng() % normal.size();
  const auto at = [&](int i) { return normal[(static_cast<size_t>(i) + offset) % normal.size()]; };
  for (int i = 0; i < vocab; ++i) {
    switch (kind) {
      case 0:
        out[i] = 2.5f * at(i);
        break;
      case 1:
        out[i] = 12.0f * at(i);
        break;
      case 2:
        out[i] = 0.01f * at(i);
        break;
      case 3:
        out[i] = RoundToBf16(3.0f * at(i) + 20.0f);
        break;
      case 4:
        out[i] = static_cast<float>(rng() % 3);
        break;
      case 5:
        out[i] = -7.25f;
        break;
      case 6:
        out[i] = rng() % 64 == 0 ? at(i) : -kInf;
        break;
      case 7:
        out[i] = rng() % 5 == 0 ? -1e9f : 4.0f * at(i);
        break;
      case 8:
        out[i] = 1e37f * at(i);
        break;
      case 9:
        out[i] = rng() % 2 == 0 ? 0.0f : -0.0f;
        break;
      default:
        out[i] = 1e-38f * at(i);
        break;
    }
  }
}
constexpr int kKinds = 11;

Rows RandomRows(int vocab, int num_rows, int64_t ld, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> gauss;
  std::vector<float> normal(static_cast<size_t>(std::max(vocab, 64)));
  for (float& x : normal) x = gauss(rng);
  Rows rows{.vocab = vocab, .ld = ld};
  rows.logits.assign(static_cast<size_t>(num_rows) * static_cast<size_t>(ld), kNan);
  const float temperatures[] = {1.0f, 0.7f, 0.0f, 2.5f, 100.0f, 0.05f, 1e-38f, 1e-45f};
  const int top_ks[] = {0, 40, 1, 2, 1000, 1024, 1025, 5000, vocab / 2, vocab};
  const float top_ps[] = {1.0f, 0.95f, 0.5f, 0.9f, 1e-30f, 0.999999f, 0.1f};
  const auto pick = [&](const auto& from) { return from[rng() % std::size(from)]; };
  for (int r = 0; r < num_rows; ++r) {
    Fill(rng, r % kKinds, vocab, normal, rows.row(r));
    SamplingParams p = {.temperature = pick(temperatures),
                        .top_k = std::min(pick(top_ks), vocab),
                        .top_p = pick(top_ps)};
    // Each way to sample once by itself, over logits like a model's.
    if (r % kKinds == 0 && r / kKinds % 4 == 0) p = {.temperature = 1.0f};
    if (r % kKinds == 0 && r / kKinds % 4 == 1) p = {.temperature = 0.8f, .top_p = 0.95f};
    rows.params.push_back(p);
    rows.keys.push_back(
        {uint64_t{rng()} << 32 | rng(), uint64_t{rng()} << 16, static_cast<uint32_t>(rng())});
    if (r % 9 == 4) rows.keys.back() = {~uint64_t{0}, ~uint64_t{0}, ~uint32_t{0}};
  }
  return rows;
}

class SampleGpu : public testing::Test {
 protected:
  void SetUp() override { RequireGpu(); }

  static std::vector<int32_t> Gpu(const Rows& rows) {
    const DeviceArray<float> logits(rows.logits);
    const DeviceArray<SamplingParams> params(rows.params);
    const DeviceArray<SampleKey> keys(rows.keys);
    const DeviceArray<int32_t> tokens(rows.params.size());
    EXPECT_TRUE(LaunchSample({.logits = logits.get(),
                              .params = params.get(),
                              .keys = keys.get(),
                              .tokens = tokens.get(),
                              .num_rows = rows.size(),
                              .vocab = rows.vocab,
                              .ld = rows.ld},
                             nullptr)
                    .ok());
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return tokens.Get();
  }

  static void ExpectSame(const Rows& rows) {
    const std::vector<int32_t> got = Gpu(rows), want = rows.Cpu();
    for (size_t r = 0; r < want.size(); ++r) {
      EXPECT_EQ(got[r], want[r]) << "row " << r << " kind " << r % kKinds << " temperature "
                                 << rows.params[r].temperature << " top_k " << rows.params[r].top_k
                                 << " top_p " << rows.params[r].top_p;
    }
    EXPECT_EQ(Gpu(rows), got) << "a second time";
  }
};

struct Shape {
  const char* name;
  int vocab, num_rows;
  int64_t ld;
  friend void PrintTo(const Shape& c, std::ostream* os) {
    *os << c.name << " " << c.num_rows << " rows of " << c.vocab << ", " << c.ld << " apart";
  }
};

class SampleGpuShapes : public SampleGpu, public testing::WithParamInterface<Shape> {};

TEST_P(SampleGpuShapes, SameTokensAsTheCpu) {
  const Shape& c = GetParam();
  ExpectSame(RandomRows(c.vocab, c.num_rows, c.ld, 7));
}

INSTANTIATE_TEST_SUITE_P(
    All, SampleGpuShapes,
    testing::Values(Shape{"one", 1, 22, 1}, Shape{"two", 2, 44, 3}, Shape{"prime", 31, 66, 31},
                    Shape{"thousand", 1000, 132, 1000}, Shape{"one_block", 4096, 66, 4096},
                    Shape{"two_blocks", 4097, 66, 4100}, Shape{"four_blocks", 16385, 66, 16385},
                    Shape{"smollm", 49152, 256, 49152}, Shape{"unaligned", 50257, 44, 50257},
                    Shape{"llama", 128256, 66, 128256}, Shape{"qwen", 151936, 110, 151936},
                    Shape{"largest", 1 << 20, 12, 1 << 20}),
    [](const auto& c) { return std::string(c.param.name); });

std::vector<Shape> RandomCases() {
  RandomShapes shapes(5);
  std::vector<Shape> cases;
  for (int i = 0; i < 20; ++i) {
    const int vocab = shapes.Log(1, 300'000);
    cases.push_back({"", vocab, std::clamp(1'000'000 / vocab, 1, shapes.Log(1, 300)),
                     vocab + shapes.Of({0, 0, 1, 3, 4})});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Random, SampleGpuShapes, testing::ValuesIn(RandomCases()));

// Every temperature with every top-k and top-p, on one row of each kind.
TEST_F(SampleGpu, AllParameters) {
  constexpr int kVocab = 20'000;
  for (int kind = 0; kind < kKinds; ++kind) {
    SCOPED_TRACE(kind);
    std::mt19937 rng(static_cast<uint32_t>(kind));
    std::normal_distribution<float> gauss;
    std::vector<float> normal(kVocab), logits(kVocab);
    for (float& x : normal) x = gauss(rng);
    Fill(rng, kind, kVocab, normal, logits.data());
    Rows rows{.vocab = kVocab, .ld = kVocab};
    for (const float temperature : {0.3f, 1.0f, 30.0f}) {
      for (const int top_k : {0, 20, 1024, 3000, kVocab}) {
        for (const float top_p : {0.3f, 0.99f, 1.0f}) {
          rows.logits.insert(rows.logits.end(), logits.begin(), logits.end());
          rows.params.push_back({temperature, top_k, top_p});
          rows.keys.push_back({rng(), rng(), 0});
        }
      }
    }
    ExpectSame(rows);
  }
}

TEST_F(SampleGpu, ErrorsAreNegativeTokens) {
  Rows rows = RandomRows(40'000, 12, 40'000, 3);
  for (SamplingParams& p : rows.params) p = {.temperature = 1.0f};
  rows.row(0)[39'999] = kNan;
  rows.row(1)[25'000] = kInf;
  rows.row(1)[25'001] = kNan;
  rows.row(2)[0] = kNan;
  rows.params[2].temperature = 0.0f;
  std::fill_n(rows.row(3), 40'000, -kInf);
  rows.params[4].temperature = -1.0f;
  rows.params[5].temperature = kNan;
  rows.params[6].top_k = 40'001;
  rows.params[7].top_k = -1;
  rows.params[8].top_p = 0.0f;
  rows.params[9].top_p = kNan;
  rows.params[10].temperature = 101.0f;
  const std::vector<int32_t> tokens = Gpu(rows);
  EXPECT_EQ(tokens, rows.Cpu());
  EXPECT_EQ(tokens[0], SampleBadLogit(39'999));
  EXPECT_EQ(tokens[1], SampleBadLogit(25'000));
  EXPECT_EQ(tokens[3], kSampleAllMinusInfinity);
  EXPECT_EQ(tokens[4], kSampleBadParams);
  EXPECT_GE(tokens[11], 0);
}

// A row's token does not depend on the rows around it.
TEST_F(SampleGpu, BatchMatesDoNotMatter) {
  const Rows rows = RandomRows(30'000, 33, 30'000, 5);
  const std::vector<int32_t> together = Gpu(rows);
  for (const size_t r : {size_t{0}, size_t{11}, size_t{17}, size_t{32}}) {
    Rows alone{.vocab = rows.vocab, .ld = rows.ld};
    const auto first = rows.logits.begin() + static_cast<std::ptrdiff_t>(r) * rows.ld;
    alone.logits.assign(first, first + rows.ld);
    alone.params = {rows.params[r]};
    alone.keys = {rows.keys[r]};
    EXPECT_EQ(Gpu(alone)[0], together[r]) << r;
  }
}

TEST_F(SampleGpu, AGraphDrawsTheNextNumberEachTime) {
  Rows rows = RandomRows(9000, 22, 9000, 6);
  const DeviceArray<float> logits(rows.logits);
  const DeviceArray<SamplingParams> params(rows.params);
  const DeviceArray<SampleKey> keys(rows.keys);
  const DeviceArray<int32_t> tokens(rows.params.size());
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ASSERT_TRUE(LaunchSample({.logits = logits.get(),
                            .params = params.get(),
                            .keys = keys.get(),
                            .tokens = tokens.get(),
                            .num_rows = rows.size(),
                            .vocab = rows.vocab,
                            .ld = rows.ld,
                            .advance = true},
                           stream)
                  .ok());
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  for (int step = 0; step < 3; ++step) {
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(tokens.Get(), rows.Cpu()) << step;
    for (SampleKey& key : rows.keys) ++key.position;
  }
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST(SampleGpuParams, BadOnesAreRefused) {
  float logits = 0;
  SamplingParams params;
  SampleKey key;
  int32_t token = 0;
  const auto bad = [](const SampleCudaParams& p) {
    EXPECT_EQ(LaunchSample(p, nullptr).code(), absl::StatusCode::kInvalidArgument);
  };
  bad({.logits = &logits, .params = &params, .keys = &key, .num_rows = 1, .vocab = 1, .ld = 1});
  const SampleCudaParams good = {.logits = &logits,
                                 .params = &params,
                                 .keys = &key,
                                 .tokens = &token,
                                 .num_rows = 1,
                                 .vocab = 1,
                                 .ld = 1};
  EXPECT_TRUE(ValidateSampleCuda(good).ok());
  SampleCudaParams p = good;
  p.vocab = 0;
  bad(p);
  p = good;
  p.vocab = p.ld = (1 << 20) + 1;
  bad(p);
  p = good;
  p.vocab = 2;
  bad(p);
  p = good;
  p.num_rows = 65536;
  bad(p);
}

}  // namespace
}  // namespace winnow::kernels
