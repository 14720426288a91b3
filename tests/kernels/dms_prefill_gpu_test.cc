// LaunchDmsPrefillCompact and LaunchDmsPrefillAttention against their CPU twins,
// StoreRow() and DmsPrefillAttentionCpu(), and against a count of the keys seen.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_sm90.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/dms_prefill_case.h"
#include "tests/kernels/random_shapes.h"
#include "tests/kernels/valid_prefill_batch.h"

namespace winnow::kernels {
namespace {

class DmsPrefillGpu : public testing::TestWithParam<PrefillCase> {
 protected:
  void SetUp() override { RequireGpu(); }
  static float Scale() { return 1.0f / std::sqrt(static_cast<float>(GetParam().head_dim)); }
};

float Length(const Bf16* x, size_t dim) {
  float sum = 0.0f;
  for (size_t d = 0; d < dim; ++d) sum += ToFloat(x[d]) * ToFloat(x[d]);
  return std::sqrt(sum);
}

template <typename T>
std::vector<T> Tail(const std::vector<T>& x, size_t count) {
  return {x.end() - static_cast<int64_t>(count), x.end()};
}

// Both read the same BF16 values. Relative to A = sum of p |v|, what the weights carry,
// they differ by: weights rounded to BF16, 2^-8; a score's float32 sum of dim products on
// either side, dim * 2^-23 * scale * |q| |k|, which moves a quotient of weighted sums by
// twice that; sums of `tokens` weights and products in float32, and 2^x. The output is
// rounded to BF16, 2^-8 of itself. Either side may lose weights and outputs below 2^-126.
void ExpectNear(const PrefillCase& c, const PrefillInputs& in, const std::vector<Bf16>& got,
                float scale) {
  const size_t dim = Size(c.head_dim), heads = Size(c.kv_heads * c.group);
  const size_t tokens = in.q.size() / dim / heads;
  std::vector<Bf16> magnitude = in.stored_v;
  for (Bf16& x : magnitude) x.bits &= 0x7fff;
  const std::vector<float> want = Tail(CpuPrefill(c, in, in.stored_v, scale), got.size());
  const std::vector<float> carried = Tail(CpuPrefill(c, in, magnitude, scale), got.size());
  const std::vector<Bf16> q = Tail(in.q, got.size());
  float longest = 0.0f;
  for (size_t i = 0; i < in.stored_k.size(); i += dim) {
    longest = std::max(longest, Length(&in.stored_k[i], dim));
  }
  float largest = 1.0f;
  for (const Bf16 x : magnitude) largest = std::max(largest, ToFloat(x));
  const float lost = static_cast<float>(tokens) * largest * 0x1p-126f;
  int wrong = 0;
  float worst = 0.0f;  // of the bound
  for (size_t row = 0; row < want.size(); row += dim) {
    const float score = static_cast<float>(dim) * 0x1p-23f * scale * Length(&q[row], dim) * longest;
    const float relative =
        0x1p-8f + 2.0f * score + static_cast<float>(tokens) * 0x1p-22f + 0x1p-20f;
    for (size_t i = row; i < row + dim; ++i) {
      const float bound = relative * carried[i] + 0x1p-8f * std::fabs(want[i]) + lost;
      const float error = std::fabs(ToFloat(got[i]) - want[i]);
      if (!(error <= bound) && wrong++ < 3) {  // true for NaN
        ADD_FAILURE() << "token " << i / dim / heads << " head " << i / dim % heads << " dim "
                      << i % dim << ": " << ToFloat(got[i]) << ", not " << want[i] << ", bound "
                      << bound;
      }
      if (bound > 0.0f) worst = std::max(worst, error / bound);
    }
  }
  EXPECT_EQ(wrong, 0) << "of " << want.size() << ", worst " << worst << " of its bound";
}

TEST_P(DmsPrefillGpu, EqualsTheCpu) {
  const PrefillCase& c = GetParam();
  std::vector<PrefillInputs> inputs;
  for (const PrefillSequence& s : c.sequences) {
    inputs.push_back(
        MakePrefillInputs(c, s.prefix + s.chunk, static_cast<uint32_t>(inputs.size() + 1)));
  }
  std::vector<const PrefillInputs*> all;
  for (const PrefillInputs& in : inputs) all.push_back(&in);
  for (const bool portable : {true, false}) {
    SCOPED_TRACE(portable ? "portable" : "best");
    const DevicePrefill got = RunPrefill(c, c.sequences, all, Scale(), portable);
    for (size_t n = 0; n < inputs.size(); ++n) {
      SCOPED_TRACE("sequence " + std::to_string(n));
      const PrefillInputs& in = inputs[n];
      EXPECT_TRUE(got.rows[n] == Tail(in.rows, got.rows[n].size())) << "flat rows";
      EXPECT_TRUE(got.band_k[n] == Tail(in.stored_k, got.band_k[n].size())) << "rounded keys";
      EXPECT_TRUE(got.band_v[n] == Tail(in.stored_v, got.band_v[n].size())) << "rounded values";
      ExpectNear(c, in, got.out[n], Scale());
      // Alone, and so again: the same bits.
      const DevicePrefill alone = RunPrefill(c, {c.sequences[n]}, {&in}, Scale(), portable);
      EXPECT_TRUE(alone.out[0] == got.out[n]) << "depends on its batch mates, or on chance";
    }
  }
}

// Keys that are all alike weigh alike, and a value that is 1, 2 or 4 in one dim, else 0,
// says by the output whether its key was counted: once, if it is seen.
TEST_P(DmsPrefillGpu, CountsEachKeySeenOnce) {
  PrefillCase c = GetParam();
  c.format = KvFormatId::kBf16;
  const size_t dim = Size(c.head_dim), kv = Size(c.kv_heads), group = Size(c.group);
  const auto value = [](size_t t) { return 1u << (t * 2654435761u >> 13) % 3; };
  std::vector<PrefillInputs> inputs;
  for (const PrefillSequence& s : c.sequences) {
    PrefillInputs in =
        MakePrefillInputs(c, s.prefix + s.chunk, static_cast<uint32_t>(inputs.size() + 1));
    for (size_t i = 0; i < in.k.size(); ++i) in.k[i] = in.k[in.k.size() - dim + i % dim];
    std::fill(in.v.begin(), in.v.end(), Bf16{0});
    for (size_t i = 0; i < in.v.size() / dim; ++i) {
      in.v[i * dim + i / kv % dim] = ToBf16(static_cast<float>(value(i / kv)));
    }
    // Every other query is 0: then a row of zeros weighs as much as a key.
    for (size_t i = 0; i < in.q.size(); ++i) {
      if (i / (dim * kv * group) % 2 == 0) in.q[i] = Bf16{0};
    }
    StorePrefillInputs(c, &in);
    inputs.push_back(std::move(in));
  }
  std::vector<const PrefillInputs*> all;
  for (const PrefillInputs& in : inputs) all.push_back(&in);
  for (const bool portable : {true, false}) {
    SCOPED_TRACE(portable ? "portable" : "best");
    const DevicePrefill got = RunPrefill(c, c.sequences, all, Scale(), portable);
    int wrong = 0;
    for (size_t n = 0; n < inputs.size(); ++n) {
      const size_t prefix = Size(c.sequences[n].prefix);
      const size_t tokens = prefix + Size(c.sequences[n].chunk);
      for (size_t i = prefix; i < tokens; ++i) {
        for (size_t g = 0; g < kv; ++g) {
          std::vector<uint32_t> sums(dim);
          uint32_t count = 0;
          for (size_t j = 0; j <= i; ++j) {
            const size_t own = j + Size(c.shift);
            const bool kept = own >= tokens || inputs[n].decisions[own * kv + g] == 0;
            if (i - j > Size(c.window) && !kept) continue;
            sums[j % dim] += value(j);
            ++count;
          }
          for (size_t h = 0; h < group; ++h) {
            const Bf16* row = &got.out[n][(((i - prefix) * kv + g) * group + h) * dim];
            for (size_t d = 0; d < dim; ++d) {
              // The weights round to 1, so all that is lost is the output's 2^-8.
              ASSERT_LT(sums[d], 100u);
              const float sum = ToFloat(row[d]) * static_cast<float>(count);
              if (!(std::fabs(sum - static_cast<float>(sums[d])) < 0.45f) && wrong++ < 3) {
                ADD_FAILURE() << "sequence " << n << " token " << i << " KV head " << g << " head "
                              << h << " dim " << d << ": " << sum << ", not " << sums[d];
              }
            }
          }
        }
      }
    }
    EXPECT_EQ(wrong, 0);
  }
}

// What the tests above call best is on Hopper the kernel for sm_90a, else the portable one.
TEST(DmsPrefillCode, IsForSm90aOnHopper) {
  RequireGpu();
  if (testing::Test::IsSkipped()) return;
  int major = 0;
  ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
  const char* force = std::getenv("CUDA_FORCE_PTX_JIT");
  const bool from_ptx = force != nullptr && std::string(force) != "0";
  EXPECT_EQ(internal::HaveSm90Code(), major == 9 && !from_ptx);
}

// What is looked at before anything is enqueued; needs no device.
TEST(DmsPrefillParams, RefusesWhatItCannotDo) {
  alignas(256) static uint8_t memory[256];
  auto* values = reinterpret_cast<Bf16*>(memory);
  const DmsPrefillBatch good = ValidPrefillBatch(memory);
  ASSERT_TRUE(ValidateDmsPrefillBatch(good).ok()) << ValidateDmsPrefillBatch(good);
  const auto code = [&](auto change) {
    DmsPrefillBatch batch = good;
    change(batch);
    return ValidateDmsPrefillBatch(batch).code();
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](auto& b) { b.head_dim = 96; }), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(code([](auto& b) { b.window = 0; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.shift = 2; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.group = 0; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.band_rows = 4; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.max_band = 7; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.num_kv_heads = 1025; }), invalid);
  EXPECT_EQ(code([](auto& b) {
              b.num_kv_heads = 128;
              b.group = 64;
              b.band_rows = 1 << 18;
            }),
            invalid);
  EXPECT_EQ(code([](auto& b) { b.compact_k = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.band_v = b.band_v + 1; }), invalid);

  DmsPrefillCompactParams compact{.batch = good, .k = values, .v = values, .kv_stride = 128};
  EXPECT_TRUE(ValidateDmsPrefillCompact(compact).ok());
  for (const int64_t stride : {127, 132}) {
    compact.kv_stride = stride;
    EXPECT_EQ(ValidateDmsPrefillCompact(compact).code(), invalid) << stride;
  }
  compact.kv_stride = 136;
  EXPECT_TRUE(ValidateDmsPrefillCompact(compact).ok());
  compact.v = values + 4;
  EXPECT_EQ(ValidateDmsPrefillCompact(compact).code(), invalid);
  compact.v = values;
  compact.format = static_cast<KvFormatId>(std::size(kKvFormats));
  EXPECT_EQ(ValidateDmsPrefillCompact(compact).code(), invalid);
  DmsPrefillCudaParams attention{
      .batch = good, .q = values, .q_stride = 384, .out = values, .scale = 0.125f};
  EXPECT_TRUE(ValidateDmsPrefillAttentionCuda(attention).ok());
  attention.scale = 0.0f;
  EXPECT_EQ(ValidateDmsPrefillAttentionCuda(attention).code(), invalid);
  attention.scale = 0.125f;
  attention.q_stride = 380;
  EXPECT_EQ(ValidateDmsPrefillAttentionCuda(attention).code(), invalid);
  // With all chunks and bands empty there is nothing to enqueue.
  attention.q_stride = 384;
  attention.batch.max_band = 0;
  attention.portable = true;
  EXPECT_TRUE(LaunchDmsPrefillAttention(attention, nullptr).ok());
}

const PrefillCase kCases[] = {
    {.name = "one_token", .sequences = {{0, 1}}},
    {.name = "a_tile_less_one", .sequences = {{0, 31}}},
    {.name = "a_tile", .sequences = {{0, 32}}},
    {.name = "a_tile_and_one", .sequences = {{0, 33}}},
    {.name = "d128", .sequences = {{0, 1021}}},
    {.name = "d64", .sequences = {{0, 1021}}, .head_dim = 64},
    {.name = "d128_long", .sequences = {{0, 2500}}, .kv_heads = 1, .group = 2, .window = 100},
    {.name = "d64_group3",
     .sequences = {{0, 777}},
     .head_dim = 64,
     .kv_heads = 3,
     .group = 3,
     .window = 64},
    {.name = "d128_group3", .sequences = {{0, 500}}, .kv_heads = 3, .group = 3, .window = 64},
    {.name = "d64_group1", .sequences = {{0, 600}}, .head_dim = 64, .group = 1, .window = 40},
    {.name = "d128_group1", .sequences = {{0, 600}}, .group = 1, .window = 40},
    {.name = "d64_group2", .sequences = {{0, 600}}, .head_dim = 64, .group = 2, .window = 256},
    {.name = "d64_group8", .sequences = {{0, 600}}, .head_dim = 64, .group = 8, .window = 100},
    {.name = "d128_group8", .sequences = {{0, 600}}, .kv_heads = 1, .group = 8, .window = 100},
    {.name = "window_1", .sequences = {{0, 400}}, .group = 1, .window = 1},
    {.name = "window_1_d64", .sequences = {{0, 400}}, .head_dim = 64, .group = 1, .window = 1},
    {.name = "window_1024", .sequences = {{0, 1500}}, .kv_heads = 1, .window = 1024},
    {.name = "window_past_the_end", .sequences = {{0, 300}}, .window = 1000},
    {.name = "keep_all", .sequences = {{0, 700}}, .window = 128, .evict_rate = 0.0},
    {.name = "evict_all", .sequences = {{0, 700}}, .window = 33, .evict_rate = 1.0},
    {.name = "evict_all_shift_0",
     .sequences = {{0, 700}},
     .window = 33,
     .shift = 0,
     .evict_rate = 1.0},
    {.name = "shift_0", .sequences = {{0, 700}}, .window = 100, .shift = 0, .evict_rate = 0.5},
    {.name = "int8", .sequences = {{0, 400}}, .window = 64, .format = KvFormatId::kInt8},
    {.name = "bf16", .sequences = {{0, 400}}, .window = 64, .format = KvFormatId::kBf16},
    {.name = "k8v8_d64",
     .sequences = {{0, 400}},
     .head_dim = 64,
     .window = 64,
     .format = KvFormatId::kK8V8},
    {.name = "int8h_d64",
     .sequences = {{0, 400}},
     .head_dim = 64,
     .window = 64,
     .format = KvFormatId::kInt8H},
    {.name = "int8_d64",
     .sequences = {{0, 400}},
     .head_dim = 64,
     .window = 64,
     .format = KvFormatId::kInt8},
    {.name = "bf16_d64",
     .sequences = {{0, 400}},
     .head_dim = 64,
     .window = 64,
     .format = KvFormatId::kBf16},
    // A warp's four rows begin within the prefix.
    {.name = "prefix_odd",
     .sequences = {{33, 50}, {7, 65}},
     .kv_heads = 3,
     .group = 1,
     .window = 40},
    {.name = "prefix_odd_k8v8",
     .sequences = {{33, 50}, {7, 65}},
     .kv_heads = 3,
     .group = 1,
     .window = 40,
     .format = KvFormatId::kK8V8},
    {.name = "ragged", .sequences = {{0, 300}, {0, 1}, {0, 129}, {0, 640}}, .window = 100},
    {.name = "ragged_d64",
     .sequences = {{0, 300}, {0, 1}, {0, 129}, {0, 640}},
     .head_dim = 64,
     .kv_heads = 3,
     .group = 3,
     .window = 100},
    {.name = "prefixes",
     .sequences = {{700, 300}, {30, 129}, {0, 90}, {100, 1}, {101, 17}},
     .window = 100,
     .evict_rate = 0.6},
    {.name = "prefixes_shift_0_d64",
     .sequences = {{700, 300}, {30, 129}, {0, 90}, {100, 1}},
     .head_dim = 64,
     .window = 100,
     .shift = 0,
     .evict_rate = 0.6},
    {.name = "prefix_one_token", .sequences = {{1000, 1}}, .window = 256},
    {.name = "one_matrix", .sequences = {{0, 300}, {70, 131}}, .one_matrix = true},
    {.name = "one_matrix_d64",
     .sequences = {{300, 200}},
     .head_dim = 64,
     .kv_heads = 3,
     .group = 3,
     .one_matrix = true},
    {.name = "sink", .sequences = {{0, 900}, {300, 200}}, .evict_rate = 0.5, .sink = 60.0f},
    {.name = "sink_d64",
     .sequences = {{0, 900}},
     .head_dim = 64,
     .group = 3,
     .window = 64,
     .evict_rate = 0.5,
     .sink = 60.0f},
    {.name = "sink_in_the_band",
     .sequences = {{0, 500}},
     .head_dim = 64,
     .group = 2,
     .window = 1024,
     .evict_rate = 0.5,
     .sink = 60.0f},
};

std::vector<PrefillCase> RandomCases() {
  RandomShapes shapes(6);
  std::vector<PrefillCase> cases;
  for (int i = 0; i < 20; ++i) {
    PrefillCase c{.name = "number_" + std::to_string(i),
                  .sequences = {},
                  .head_dim = shapes.HeadDim(),
                  .kv_heads = shapes.In(1, 3),
                  .group = shapes.Of({1, 2, 3, 4, 5, 8}),
                  .window = shapes.Window(),
                  .shift = shapes.In(0, 1),
                  .evict_rate = shapes.EvictRate(),
                  .format = shapes.Format(),
                  .sink = static_cast<float>(shapes.Of({1, 1, 4, 60})),
                  .one_matrix = shapes.OneIn(4)};
    const int most = 1500 / (c.kv_heads * c.group);
    for (int n = shapes.Of({1, 1, 2, 5}); n > 0; --n) {
      const int prefix = shapes.Of({0, 0, 1, c.window - 1, c.window, c.window + 1, most});
      c.sequences.push_back({std::min(prefix, 400), shapes.Log(1, most)});
    }
    cases.push_back(c);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Random, DmsPrefillGpu, testing::ValuesIn(RandomCases()),
                         [](const auto& c) { return c.param.name; });
INSTANTIATE_TEST_SUITE_P(All, DmsPrefillGpu, testing::ValuesIn(kCases),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
