// LaunchDmsPrefillFp8Compact and LaunchDmsPrefillFp8Attention against StoreRow() and
// attention in double over the stored values.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cuda/dms_prefill_fp8.h"
#include "kernels/cuda/dms_prefill_fp8_scales.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/dms_prefill_fp8_case.h"
#include "tests/kernels/random_shapes.h"

namespace winnow::kernels {
namespace {

struct DeviceResult {
  std::vector<std::vector<Bf16>> out;  // of each sequence's chunk
  std::vector<std::vector<uint8_t>> rows;
};

// Host copies of DmsPrefillFp8Rows, all bytes 0xff (NaN) at first.
struct HostRows {
  HostRows(int heads, int rows_of_head)
      : rows(rows_of_head),
        k(Size(heads) * Size(rows) * kDim, 0xff),
        v(Size(heads) * Size(rows) * kPrefillFp8Channels, 0xff),
        scales(Size(heads) * Size(rows) * 2, 0xffff) {}
  // `largest`: of V's scales laid out together.
  void Put(int head, int row, const uint8_t* flat, float largest) {
    const size_t first = Size(head) * Size(rows);
    uint16_t k_scale, v_scale;
    const TokenRef token = RowToken(KvFormatId::kFp8, kDim, flat);
    std::memcpy(&k_scale, token.k_scale, 2);
    std::memcpy(&v_scale, token.v_scale, 2);
    float scale = internal::PrefillFp8Scale(v_scale);
    const int octaves = internal::PrefillFp8Octaves(scale, largest);
    scale = std::ldexp(scale, octaves);
    const uint2 sums = internal::PrefillFp8SumCodes(scale);
    for (int d = 0; d < kDim; ++d) {
      k[first * kDim + Size(PrefillFp8KeyByte(row, d))] = token.k[d];
    }
    for (int d = 0; d < kPrefillFp8Channels; ++d) {
      const int n = d - kDim;
      v[first * kPrefillFp8Channels + Size(PrefillFp8ValueByte(row, d))] =
          n < 0 ? internal::PrefillFp8ShiftCode(token.v[d], octaves)
                : static_cast<uint8_t>((n < 4 ? sums.x : sums.y) >> (n % 4 * 8));
    }
    const internal::PrefillFp8Scales x = internal::PrefillFp8ScalesOf(k_scale, scale);
    scales[2 * first + Size(PrefillFp8ScaleAt(row))] = x.k;
    scales[2 * first + Size(PrefillFp8ScaleAt(row)) + 2] = x.v;
  }
  int rows;
  std::vector<uint8_t> k, v;
  std::vector<uint16_t> scales;
};

struct DeviceRows {
  explicit DeviceRows(const HostRows& host) : k(host.k), v(host.v), scales(host.scales) {}
  DmsPrefillFp8Rows get() const { return {k.get(), v.get(), scales.get()}; }
  void Check() const {
    k.Get();
    v.Get();
    scales.Get();
  }
  DeviceArray<uint8_t> k, v;
  DeviceArray<uint16_t> scales;
};

// Both ops over a batch of these sequences, with rows of nobody between them.
DeviceResult RunOnDevice(const Fp8Case& c, const std::vector<Sequence>& sequences,
                         const std::vector<const Inputs*>& inputs) {
  constexpr int kGap = 3;
  const size_t kv = Size(c.kv_heads), heads = kv * Size(c.group);
  std::vector<DmsPrefillSequence> places;
  int rows = 0, band = 0, compact = 0, max_band = 0;
  for (const Sequence& s : sequences) {
    const int prefix = std::min(s.prefix, c.window);
    places.push_back({rows, s.chunk, band, prefix, compact});
    rows += s.chunk + kGap;
    band += (prefix + s.chunk + 15) / 16 * 16;
    compact += (s.prefix + s.chunk + 15) / 16 * 16;
    max_band = std::max(max_band, prefix + s.chunk);
  }
  band = std::max(band, (rows + 15) / 16 * 16);
  std::vector<Bf16> q(Size(rows) * heads * kDim, Bf16{0xffff}), k(Size(rows) * kv * kDim, q[0]);
  std::vector<Bf16> v(k);
  std::vector<uint8_t> decisions(Size(rows) * kv, 0xff), prefix_evict(Size(band) * kv, 0xff);
  std::vector<uint8_t> prefix_rows(Size(band) * kv * kTokenBytes, 0xff);
  std::vector<int32_t> num_survivors;
  HostRows host_compact(c.kv_heads, compact);
  for (size_t n = 0; n < sequences.size(); ++n) {
    const Inputs& in = *inputs[n];
    const DmsPrefillSequence& at = places[n];
    const size_t prefix = Size(sequences[n].prefix), row = Size(at.row);
    const int band_start = sequences[n].prefix - at.num_prefix;
    const auto copy = [&](const auto& from, auto& to, size_t width) {
      std::copy(from.begin() + static_cast<int64_t>(prefix * width), from.end(),
                to.begin() + static_cast<int64_t>(row * width));
    };
    copy(in.q, q, heads * kDim);
    copy(in.k, k, kv * kDim);
    copy(in.v, v, kv * kDim);
    copy(in.decisions, decisions, kv);
    for (int g = 0; g < c.kv_heads; ++g) {
      for (int i = 0; i < at.num_prefix; ++i) {
        // With shift 1 the newest prefix token's bit comes with the chunk: wrong here.
        const bool newest = c.shift == 1 && i + 1 == at.num_prefix;
        const size_t to = Size(at.band_row + i) * kv + Size(g);
        prefix_evict[to] = Kept(c, in, band_start + i, g) == newest ? 1 : 0;
        std::memcpy(&prefix_rows[to * kTokenBytes],
                    &in.rows[(Size(band_start + i) * kv + Size(g)) * kTokenBytes], kTokenBytes);
      }
      int count = 0;
      for (int t = 0; t < band_start; ++t) {
        if (!Kept(c, in, t, g)) continue;
        host_compact.Put(g, at.compact_row + count++,
                         &in.rows[(Size(t) * kv + Size(g)) * kTokenBytes],
                         LargestValueScale(c, in, sequences[n].prefix, t, g));
      }
      num_survivors.push_back(count);
    }
  }
  const DeviceArray<Bf16> d_q(q), d_k(k), d_v(v), out(q.size());
  const DeviceArray<uint8_t> d_decisions(decisions), d_prefix_evict(prefix_evict);
  const DeviceArray<uint8_t> d_prefix_rows(prefix_rows), flat(Size(rows) * kv * kTokenBytes);
  const DeviceArray<int32_t> d_survivors(num_survivors);
  const DeviceArray<DmsPrefillSequence> d_places(places);
  const DeviceRows d_band(HostRows(c.kv_heads, band)), d_compact(host_compact);
  DmsPrefillFp8Batch batch{.rows = {.sequences = d_places.get(),
                                    .num_survivors = d_survivors.get(),
                                    .batch = static_cast<int>(sequences.size()),
                                    .num_kv_heads = c.kv_heads,
                                    .group = c.group,
                                    .head_dim = kDim,
                                    .window = c.window,
                                    .shift = c.shift,
                                    .num_rows = rows,
                                    .band_rows = band,
                                    .compact_rows = compact,
                                    .max_band = max_band},
                           .band = d_band.get(),
                           .compact = d_compact.get()};
  const DeviceArray<uint8_t> scratch(DmsPrefillFp8ScratchBytes(batch.rows));
  batch.rows.scratch = scratch.get();
  absl::Status status = LaunchDmsPrefillFp8Compact({.batch = batch,
                                                    .k = d_k.get(),
                                                    .v = d_v.get(),
                                                    .kv_stride = static_cast<int64_t>(kv * kDim),
                                                    .decisions = d_decisions.get(),
                                                    .prefix_evict = d_prefix_evict.get(),
                                                    .prefix_rows = d_prefix_rows.get(),
                                                    .rows = flat.get()},
                                                   nullptr);
  EXPECT_TRUE(status.ok()) << status;
  status = LaunchDmsPrefillFp8Attention({.batch = batch,
                                         .q = d_q.get(),
                                         .q_stride = static_cast<int64_t>(heads * kDim),
                                         .out = out.get(),
                                         .scale = inputs[0]->scale},
                                        nullptr);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());

  const std::vector<Bf16> all_out = out.Get();
  const std::vector<uint8_t> all_rows = flat.Get();
  scratch.Get();
  d_band.Check();
  d_compact.Check();
  DeviceResult result;
  const auto cut = [](const auto& x, size_t at, size_t n) {
    return std::decay_t<decltype(x)>(x.begin() + static_cast<int64_t>(at),
                                     x.begin() + static_cast<int64_t>(at + n));
  };
  for (const DmsPrefillSequence& at : places) {
    const size_t chunk = Size(at.num_tokens), row = Size(at.row);
    result.out.push_back(cut(all_out, row * heads * kDim, chunk * heads * kDim));
    result.rows.push_back(cut(all_rows, row * kv * kTokenBytes, chunk * kv * kTokenBytes));
    for (const Bf16 x : cut(all_out, (row + chunk) * heads * kDim, Size(kGap) * heads * kDim)) {
      EXPECT_EQ(x.bits, 0xffff) << "a row of nobody was written";
    }
  }
  return result;
}

class DmsPrefillFp8Gpu : public testing::TestWithParam<Fp8Case> {
 protected:
  void SetUp() override { RequireGpu(); }
};

struct CaseRun {
  std::vector<Inputs> inputs;
  DeviceResult got;
};

CaseRun RunCase(const Fp8Case& c, Data data) {
  CaseRun run;
  std::vector<const Inputs*> all;
  for (const Sequence& s : c.sequences) {
    const uint32_t seed = static_cast<uint32_t>(run.inputs.size() + 1);
    run.inputs.push_back(MakeInputs(c, s.prefix + s.chunk, data, seed));
  }
  for (const Inputs& in : run.inputs) all.push_back(&in);
  run.got = RunOnDevice(c, c.sequences, all);
  for (size_t n = 0; n < run.inputs.size(); ++n) {
    const std::vector<uint8_t>& rows = run.inputs[n].rows;
    const std::vector<uint8_t>& got = run.got.rows[n];
    EXPECT_TRUE(std::equal(got.begin(), got.end(), rows.end() - static_cast<int64_t>(got.size())))
        << "flat rows of sequence " << n;
    const DeviceResult alone = RunOnDevice(c, {c.sequences[n]}, {&run.inputs[n]});
    EXPECT_TRUE(alone.out[0] == run.got.out[n]) << "depends on its batch mates, or on chance";
  }
  return run;
}

void ExpectWithin(const std::vector<Bf16>& got, const std::vector<double>& want,
                  const std::vector<double>& bound, const Fp8Case& c) {
  ASSERT_EQ(got.size(), want.size());
  int wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(double{ToFloat(got[i])} - want[i]);
    if (!(error <= bound[i]) && wrong++ < 3) {  // also for NaN
      const size_t heads = Size(c.kv_heads * c.group);
      ADD_FAILURE() << "token " << i / kDim / heads << " head " << i / kDim % heads << " dim "
                    << i % kDim << ": " << ToFloat(got[i]) << ", not " << want[i] << " within "
                    << bound[i];
    }
  }
  EXPECT_EQ(wrong, 0) << "of " << want.size();
}

// Every code and weight is exact (but for 9/8 of them all, which a row's largest brings), and
// so are sums in which signs cancel. What is left is the rounding of the output, 2^-8, and of
// float32, and what the sum of weights drops: 2^-13 of it for 32 keys, up to 2048, and those of
// the list that nobody sees. A key missed, taken twice or out of place shows.
TEST_P(DmsPrefillFp8Gpu, IsExactWhereNothingIsRounded) {
  const Fp8Case& c = GetParam();
  const CaseRun run = RunCase(c, Data::kExact);
  for (size_t n = 0; n < run.inputs.size(); ++n) {
    SCOPED_TRACE("sequence " + std::to_string(n));
    const Inputs& in = run.inputs[n];
    std::vector<double> q(in.q.size());
    std::transform(in.q.begin(), in.q.end(), q.begin(), [](Bf16 x) { return ToFloat(x); });
    const Expected e = Attention(c, in, c.sequences[n].prefix, q, true);
    std::vector<double> bound(e.out.size());
    const double dropped = 0x1p-13 * std::min(64, in.tokens / 32 + 4);
    for (size_t i = 0; i < bound.size(); ++i) {
      bound[i] = (0x1p-8 + dropped) * std::fabs(e.out[i]) + 0x1p-16 * e.absolute[i];
    }
    ExpectWithin(run.got.out[n], e.out, bound, c);
  }
}

// Against attention with the queries rounded as the kernel rounds them. What differs:
// Each weight is off by 2^-4 of it at most, rounded to e4m3, by 3.1 % of the middle of
// what 1 + f is above 2^f, and by 1.3 % for exponents in float16: 2^-11 of |x unit| < 1.5, of
// z < 1 and of log2 vs < 1/2 at 127 / 8 octaves. All that is independent of other keys', and
// takes part in the output times value - output: by Hoeffding's inequality the sum is off by
// more than 0.107 sqrt(2 ln(2 / p) sum of squares) with probability p; 8.5 stands for
// p = 4e-16. A weight below e4m3's normal range is off by `underflow` at most. A score is
// summed in float16 in four steps of terms that add up to the norms' product at most, of
// which 2^-11 and of the largest term 2^-13 are lost in each, and 2^-11 with the row's unit; a
// weight moves as the score does. A sum in the tensor core drops what is under 2^-13 of its
// largest term 64 times for the outputs of 2048 keys, as it does for the weights' sum.
// The inverse of V's scale in that sum is off by 2^-8, as the output's rounding is. A code of V
// made smaller by octaves is off by 2^-10 at most, and what it loses by a sum of weights.
void ExpectNear(const Fp8Case& c, Data data) {
  const CaseRun run = RunCase(c, data);
  for (size_t n = 0; n < run.inputs.size(); ++n) {
    SCOPED_TRACE("sequence " + std::to_string(n));
    const Inputs& in = run.inputs[n];
    const int prefix = c.sequences[n].prefix;
    const Expected e = Attention(c, in, prefix, RoundedQueries(in), true);
    double longest_q = 0.0, longest_k = 0.0;
    const auto longest = [](const auto& x, auto value) {
      double most = 0.0;
      for (size_t i = 0; i < x.size(); i += kDim) {
        double sum = 0.0;
        for (size_t d = 0; d < kDim; ++d) sum += std::pow(double{value(x[i + d])}, 2);
        most = std::max(most, std::sqrt(sum));
      }
      return most;
    };
    longest_q = longest(in.q, [](Bf16 x) { return ToFloat(x); });
    longest_k = longest(in.stored_k, [](float x) { return x; });
    const double score = (5 * 0x1p-11 + 4 * 0x1p-13) * longest_q * longest_k * double{in.scale};
    std::vector<double> bound(e.out.size());
    for (size_t i = 0; i < bound.size(); ++i) {
      const double out = std::fabs(e.out[i]);
      const double error =
          8.5 * 0.107 * (std::sqrt(e.square[i]) + out * std::sqrt(e.concentration[i])) +
          e.underflow[i] + e.lost[i] * out + 0x1p-10 * e.scale[i] +
          (score + 64 * 0x1p-13) * (e.absolute[i] + out);
      // Of a sum of weights without what is lost, which is 1 with it.
      bound[i] = error / (1.0 - std::min(e.lost[i], 0.999)) + 0x1p-7 * out;
    }
    ExpectWithin(run.got.out[n], e.out, bound, c);

    // What to expect of the whole: printed, and written down in docs/benchmarks.md.
    std::vector<double> exact_q(in.q.size());
    std::transform(in.q.begin(), in.q.end(), exact_q.begin(), [](Bf16 x) { return ToFloat(x); });
    const Expected exact = Attention(c, in, prefix, exact_q, false);
    double square = 0.0, square_rounded = 0.0, most = 0.0, of = 0.0;
    for (size_t i = 0; i < e.out.size(); ++i) {
      const double got = ToFloat(run.got.out[n][i]), error = std::fabs(got - exact.out[i]);
      square += error * error;
      square_rounded += (got - e.out[i]) * (got - e.out[i]);
      of += exact.out[i] * exact.out[i];
      most = std::max(most, error);
    }
    const double count = static_cast<double>(e.out.size());
    std::printf(
        "%s: error RMS %.4f of the output's RMS %.4f (%.4f without the queries'), most %.4f\n",
        c.name.c_str(), std::sqrt(square / of), std::sqrt(of / count),
        std::sqrt(square_rounded / of), most);
  }
}

TEST_P(DmsPrefillFp8Gpu, IsNearOnNormalData) { ExpectNear(GetParam(), Data::kNormal); }
TEST_P(DmsPrefillFp8Gpu, IsNearOnPeakyData) { ExpectNear(GetParam(), Data::kPeaky); }

// A key that is not finite makes what sees it NaN, and nothing else.
TEST(DmsPrefillFp8, NonFiniteKeysAndQueries) {
  RequireGpu();
  if (testing::Test::IsSkipped() || testing::Test::HasFatalFailure()) return;
  const Fp8Case c{
      .name = "nan", .sequences = {{0, 300}}, .kv_heads = 1, .window = 40, .evict_rate = 1.0};
  Inputs in = MakeInputs(c, 300, Data::kNormal, 3);
  in.k[100 * kDim + 3] = Bf16{0x7f80};
  in.v[200 * kDim] = Bf16{0x7fc0};
  in.q[(250 * 4 + 2) * kDim + 77] = Bf16{0x7f80};
  const DeviceResult got = RunOnDevice(c, c.sequences, {&in});
  for (int t = 0; t < 300; ++t) {
    for (int h = 0; h < 4; ++h) {
      const bool sees = (t >= 100 && t <= 140) || (t >= 200 && t <= 240) || (t == 250 && h == 2);
      for (int d = 0; d < kDim; ++d) {
        const bool nan = std::isnan(ToFloat(got.out[0][Size((t * 4 + h) * kDim + d)]));
        ASSERT_EQ(nan, sees) << t << " " << h << " " << d;
      }
    }
  }
}

// What is looked at before anything is enqueued; needs no device.
TEST(DmsPrefillFp8, RefusesWhatItCannotDo) {
  alignas(256) static uint8_t memory[256];
  auto* values = reinterpret_cast<Bf16*>(memory);
  const DmsPrefillFp8Rows rows{
      .k = memory, .v = memory, .scales = reinterpret_cast<uint16_t*>(memory)};
  const DmsPrefillFp8Batch good{.rows = {.sequences = reinterpret_cast<DmsPrefillSequence*>(memory),
                                         .scratch = memory,
                                         .batch = 1,
                                         .num_kv_heads = 2,
                                         .group = 3,
                                         .head_dim = 128,
                                         .window = 1,
                                         .num_rows = 5,
                                         .band_rows = 16,
                                         .compact_rows = 32,
                                         .max_band = 6},
                                .band = rows,
                                .compact = rows};
  ASSERT_TRUE(ValidateDmsPrefillFp8Batch(good).ok()) << ValidateDmsPrefillFp8Batch(good);
  const auto code = [&](auto change) {
    DmsPrefillFp8Batch batch = good;
    change(batch);
    return ValidateDmsPrefillFp8Batch(batch).code();
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](auto& b) { b.rows.head_dim = 64; }), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(code([](auto& b) { b.rows.window = 0; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.rows.band_rows = 24; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.rows.compact_rows = 40; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.band.scales = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& b) { b.compact.v = b.compact.v + 8; }), invalid);

  DmsPrefillFp8CompactParams compact{.batch = good, .k = values, .v = values, .kv_stride = 256};
  EXPECT_TRUE(ValidateDmsPrefillFp8Compact(compact).ok());
  for (const int64_t stride : {255, 260}) {
    compact.kv_stride = stride;
    EXPECT_EQ(ValidateDmsPrefillFp8Compact(compact).code(), invalid) << stride;
  }
  compact.kv_stride = 256;
  compact.v = values + 4;
  EXPECT_EQ(ValidateDmsPrefillFp8Compact(compact).code(), invalid);
  compact.v = values;
  compact.prefix_rows = memory + 2;
  EXPECT_EQ(ValidateDmsPrefillFp8Compact(compact).code(), invalid);
  DmsPrefillFp8CudaParams attention{
      .batch = good, .q = values, .q_stride = 768, .out = values, .scale = 0.125f};
  EXPECT_TRUE(ValidateDmsPrefillFp8Attention(attention).ok());
  attention.scale = 0.0f;
  EXPECT_EQ(ValidateDmsPrefillFp8Attention(attention).code(), invalid);
  attention.scale = 0.125f;
  attention.q_stride = 772;
  EXPECT_EQ(ValidateDmsPrefillFp8Attention(attention).code(), invalid);
}

const Fp8Case kCases[] = {
    {.name = "one_token", .sequences = {{0, 1}}},
    {.name = "a_tile_less_one", .sequences = {{0, 31}}},
    {.name = "a_tile", .sequences = {{0, 32}}},
    {.name = "a_tile_and_one", .sequences = {{0, 33}}},
    {.name = "some", .sequences = {{0, 1021}}},
    {.name = "longer", .sequences = {{0, 2500}}, .kv_heads = 1, .group = 1, .window = 100},
    {.name = "group1", .sequences = {{0, 600}}, .group = 1, .window = 40},
    {.name = "group2", .sequences = {{0, 600}}, .group = 2, .window = 256},
    {.name = "group3", .sequences = {{0, 500}}, .kv_heads = 3, .group = 3, .window = 64},
    {.name = "group8", .sequences = {{0, 600}}, .kv_heads = 1, .group = 8, .window = 100},
    {.name = "window_1", .sequences = {{0, 400}}, .group = 1, .window = 1},
    {.name = "window_1024", .sequences = {{0, 1500}}, .kv_heads = 1, .group = 2, .window = 1024},
    {.name = "window_past_the_end", .sequences = {{0, 300}}, .window = 1000},
    {.name = "keep_all", .sequences = {{0, 700}}, .window = 128, .evict_rate = 0.0},
    {.name = "evict_all", .sequences = {{0, 700}}, .window = 33, .evict_rate = 1.0},
    {.name = "evict_all_shift_0",
     .sequences = {{0, 700}},
     .window = 33,
     .shift = 0,
     .evict_rate = 1.0},
    {.name = "shift_0", .sequences = {{0, 700}}, .window = 100, .shift = 0, .evict_rate = 0.5},
    {.name = "ragged", .sequences = {{0, 300}, {0, 1}, {0, 129}, {0, 640}}, .window = 100},
    {.name = "prefixes",
     .sequences = {{700, 300}, {30, 129}, {0, 90}, {100, 1}, {101, 17}},
     .window = 100,
     .evict_rate = 0.6},
    {.name = "prefixes_shift_0",
     .sequences = {{700, 300}, {30, 129}, {0, 90}, {100, 1}},
     .window = 100,
     .shift = 0,
     .evict_rate = 0.6},
    {.name = "prefix_one_token", .sequences = {{1000, 1}}, .window = 256},
};

std::vector<Fp8Case> RandomCases() {
  RandomShapes shapes(8);
  std::vector<Fp8Case> cases;
  for (int i = 0; i < 12; ++i) {
    Fp8Case c{.name = "number_" + std::to_string(i),
              .sequences = {},
              .kv_heads = shapes.In(1, 3),
              .group = shapes.Of({1, 2, 3, 4, 8}),
              .window = shapes.Window(),
              .shift = shapes.In(0, 1),
              .evict_rate = shapes.EvictRate()};
    const int most = std::min(400, 1200 / (c.kv_heads * c.group));
    for (int n = shapes.Of({1, 1, 2, 4}); n > 0; --n) {
      const int prefix = shapes.Of({0, 0, 1, c.window - 1, c.window, c.window + 1, most});
      c.sequences.push_back({std::min(prefix, 400), shapes.Log(1, most)});
    }
    cases.push_back(c);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Random, DmsPrefillFp8Gpu, testing::ValuesIn(RandomCases()),
                         [](const auto& c) { return c.param.name; });
INSTANTIATE_TEST_SUITE_P(All, DmsPrefillFp8Gpu, testing::ValuesIn(kCases),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
