// LaunchDmsPrefillCompact and LaunchDmsPrefillAttention against their CPU twins,
// StoreRow() and DmsPrefillAttentionCpu().
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/dms_prefill.h"
#include "kernels/dms_prefill_attention.h"
#include "tests/kernels/device_memory.h"

namespace winnow::kernels {
namespace {

struct Sequence {
  int prefix, chunk;
};

struct PrefillCase {
  std::string name;
  std::vector<Sequence> sequences;
  int head_dim = 128, kv_heads = 2, group = 4, window = 256, shift = 1;
  double evict_rate = 0.875;  // of KV head 0; later heads evict a little less
  KvFormatId format = KvFormatId::kFp8;
  friend void PrintTo(const PrefillCase& c, std::ostream* os) { *os << c.name; }
};

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t n, int fill = 0xff) : n_(n) {  // 0xffff is a BF16 NaN
    EXPECT_EQ(cudaMalloc(&data_, bytes() + kGuard), cudaSuccess);
    EXPECT_EQ(cudaMemset(data_, fill, bytes() + kGuard), cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& x) : DeviceArray(x.size()) {
    EXPECT_EQ(cudaMemcpy(data_, x.data(), bytes(), cudaMemcpyHostToDevice), cudaSuccess);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* get() const { return static_cast<T*>(data_); }
  void Put(size_t at, const T* x, size_t n) {
    EXPECT_EQ(cudaMemcpy(get() + at, x, n * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  std::vector<T> Get() const {
    std::vector<T> x(n_);
    EXPECT_EQ(cudaMemcpy(x.data(), data_, bytes(), cudaMemcpyDeviceToHost), cudaSuccess);
    std::vector<uint8_t> guard(kGuard);
    EXPECT_EQ(cudaMemcpy(guard.data(), static_cast<uint8_t*>(data_) + bytes(), kGuard,
                         cudaMemcpyDeviceToHost),
              cudaSuccess);
    EXPECT_TRUE(std::all_of(guard.begin(), guard.end(), [](uint8_t b) { return b == 0xff; }));
    return x;
  }

 private:
  static constexpr size_t kGuard = 64;
  size_t bytes() const { return n_ * sizeof(T); }
  size_t n_;
  void* data_ = nullptr;
};

// All tokens of a sequence, prefix first.
struct SequenceInputs {
  std::vector<Bf16> q, k, v;       // [tokens, heads, head_dim]
  std::vector<uint8_t> decisions;  // [tokens, kv_heads]
  // Of StoreRow(): flat rows, and what they hold, rounded to BF16.
  std::vector<uint8_t> rows;
  std::vector<Bf16> stored_k, stored_v;
};

constexpr size_t Size(int n) { return static_cast<size_t>(n); }

SequenceInputs MakeInputs(const PrefillCase& c, int tokens, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  const auto fill = [&](int heads, float sigma) {
    std::vector<Bf16> x(Size(tokens) * Size(heads) * Size(c.head_dim));
    for (Bf16& value : x) value = ToBf16(sigma * normal(rng));
    return x;
  };
  SequenceInputs in;
  in.q = fill(c.kv_heads * c.group, 1.5f);
  in.k = fill(c.kv_heads, 1.0f);
  in.v = fill(c.kv_heads, 1.0f);
  const size_t vectors = Size(tokens) * Size(c.kv_heads), dim = Size(c.head_dim);
  // Signed zeros, ties, the smallest and rows of zeros must be stored alike too.
  for (size_t i = 0; i < vectors; i += 7) {
    in.k[i * dim] = Bf16{0x8000};
    in.k[i * dim + 1] = Bf16{0x0001};
    for (size_t d = 2; d < dim; ++d) in.k[i * dim + d].bits &= 0xffe0;
    if (i % 5 == 0) std::fill_n(in.v.begin() + static_cast<int64_t>(i * dim), dim, Bf16{0});
  }
  in.decisions.resize(vectors);
  for (size_t i = 0; i < vectors; ++i) {
    const double rate = c.evict_rate <= 0.0 || c.evict_rate >= 1.0
                            ? c.evict_rate
                            : c.evict_rate - 0.05 * static_cast<double>(i % Size(c.kv_heads));
    in.decisions[i] = uniform(rng) < rate ? 1 : 0;
  }
  const size_t row_bytes = TokenBytes(c.format, c.head_dim);
  in.rows.resize(vectors * row_bytes);
  in.stored_k.resize(vectors * dim);
  in.stored_v.resize(vectors * dim);
  std::vector<float> k(dim), v(dim);
  for (size_t i = 0; i < vectors; ++i) {
    for (size_t d = 0; d < dim; ++d) {
      k[d] = ToFloat(in.k[i * dim + d]);
      v[d] = ToFloat(in.v[i * dim + d]);
    }
    uint8_t* row = &in.rows[i * row_bytes];
    StoreRow(c.format, c.head_dim, k.data(), v.data(), row);
    const TokenRef token = RowToken(c.format, c.head_dim, row);
    LoadK(c.format, c.head_dim, token, k.data());
    LoadV(c.format, c.head_dim, token, v.data());
    for (size_t d = 0; d < dim; ++d) {
      in.stored_k[i * dim + d] = ToBf16(k[d]);
      in.stored_v[i * dim + d] = ToBf16(v[d]);
    }
  }
  return in;
}

// The CPU twin over the same BF16 keys and values: all of a sequence as one chunk.
std::vector<float> CpuAttention(const PrefillCase& c, const SequenceInputs& in, int tokens,
                                float scale) {
  const size_t dim = Size(c.head_dim), vectors = Size(tokens) * Size(c.kv_heads);
  std::vector<uint8_t> rows(vectors * dim * 4);
  for (size_t i = 0; i < vectors; ++i) {
    std::memcpy(&rows[i * dim * 4], &in.stored_k[i * dim], dim * 2);
    std::memcpy(&rows[i * dim * 4 + dim * 2], &in.stored_v[i * dim], dim * 2);
  }
  std::vector<float> q(in.q.size()), out(in.q.size());
  std::transform(in.q.begin(), in.q.end(), q.begin(), [](Bf16 x) { return ToFloat(x); });
  const std::vector<Span> spans(Size(c.kv_heads));
  const int heads = c.kv_heads * c.group;
  ThreadScratch scratch(1, AttentionScratchBytes(heads, c.kv_heads, c.head_dim, tokens));
  const absl::Status status = DmsPrefillAttentionCpu(
      {.layout = {.format = KvFormatId::kBf16,
                  .head_dim = c.head_dim,
                  .window = c.window,
                  .shift = c.shift,
                  .slots_per_page = SlotsPerPage(KvFormatId::kBf16, c.head_dim)},
       .spans = spans.data(),
       .q = q.data(),
       .rows = rows.data(),
       .decisions = in.decisions.data(),
       .out_f32 = out.data(),
       .num_tokens = tokens,
       .num_heads = heads,
       .num_kv_heads = c.kv_heads,
       .scale = scale,
       .scratch = &scratch},
      nullptr);
  EXPECT_TRUE(status.ok()) << status;
  return out;
}

struct DeviceResult {
  std::vector<std::vector<Bf16>> out, band_k, band_v;  // of each sequence's chunk
  std::vector<std::vector<uint8_t>> rows;
};

// Both ops over a batch of these sequences, with rows of nobody between them.
DeviceResult RunOnDevice(const PrefillCase& c, const std::vector<Sequence>& sequences,
                         const std::vector<const SequenceInputs*>& inputs, float scale,
                         bool portable) {
  constexpr int kGap = 3, kBandGap = 8;
  const size_t dim = Size(c.head_dim), kv = Size(c.kv_heads) * dim, heads = Size(c.group) * kv;
  std::vector<DmsPrefillSequence> places;
  int rows = 0, band = 0, compact = 0, max_band = 0;
  for (const Sequence& s : sequences) {
    const int prefix = std::min(s.prefix, c.window);
    places.push_back({rows, s.chunk, band, prefix, compact});
    rows += s.chunk + kGap;
    band += prefix + s.chunk + kBandGap;
    compact += s.prefix + s.chunk + 8;
    max_band = std::max(max_band, prefix + s.chunk);
  }
  const size_t row_bytes = TokenBytes(c.format, c.head_dim);
  DeviceArray<Bf16> q(Size(rows) * heads), k(Size(rows) * kv), v(Size(rows) * kv);
  DeviceArray<Bf16> out(Size(rows) * heads), band_k(Size(band) * kv), band_v(Size(band) * kv);
  DeviceArray<Bf16> compact_k(Size(compact) * kv), compact_v(Size(compact) * kv);
  DeviceArray<uint8_t> decisions(Size(rows) * Size(c.kv_heads));
  DeviceArray<uint8_t> prefix_evict(Size(band) * Size(c.kv_heads));
  DeviceArray<uint8_t> flat(Size(rows) * Size(c.kv_heads) * row_bytes);
  std::vector<int32_t> num_survivors;
  for (size_t n = 0; n < sequences.size(); ++n) {
    const SequenceInputs& in = *inputs[n];
    const DmsPrefillSequence& at = places[n];
    const size_t chunk = Size(at.num_tokens), prefix = Size(sequences[n].prefix);
    const size_t band_start = prefix - Size(at.num_prefix);
    q.Put(Size(at.row) * heads, &in.q[prefix * heads], chunk * heads);
    k.Put(Size(at.row) * kv, &in.k[prefix * kv], chunk * kv);
    v.Put(Size(at.row) * kv, &in.v[prefix * kv], chunk * kv);
    decisions.Put(Size(at.row * c.kv_heads), &in.decisions[prefix * Size(c.kv_heads)],
                  chunk * Size(c.kv_heads));
    band_k.Put(Size(at.band_row) * kv, &in.stored_k[band_start * kv], Size(at.num_prefix) * kv);
    band_v.Put(Size(at.band_row) * kv, &in.stored_v[band_start * kv], Size(at.num_prefix) * kv);
    const auto evicted = [&](size_t t, size_t g) {
      return in.decisions[(t + Size(c.shift)) * Size(c.kv_heads) + g];
    };
    for (size_t g = 0; g < Size(c.kv_heads); ++g) {
      for (size_t i = 0; i < Size(at.num_prefix); ++i) {
        // With shift 1 the newest prefix token's bit comes with the chunk: poison here.
        const uint8_t bit = c.shift == 1 && i + 1 == Size(at.num_prefix)
                                ? 1 - evicted(band_start + i, g)
                                : evicted(band_start + i, g);
        prefix_evict.Put((Size(at.band_row) + i) * Size(c.kv_heads) + g, &bit, 1);
      }
      int count = 0;
      for (size_t t = 0; t < band_start; ++t) {
        if (evicted(t, g)) continue;
        const size_t to = (g * Size(compact) + Size(at.compact_row + count++)) * dim;
        compact_k.Put(to, &in.stored_k[t * kv + g * dim], dim);
        compact_v.Put(to, &in.stored_v[t * kv + g * dim], dim);
      }
      num_survivors.push_back(count);
    }
  }
  const DeviceArray<int32_t> survivors(num_survivors);
  const DeviceArray<DmsPrefillSequence> device_places(places);
  DmsPrefillBatch batch{.sequences = device_places.get(),
                        .num_survivors = survivors.get(),
                        .band_k = band_k.get(),
                        .band_v = band_v.get(),
                        .compact_k = compact_k.get(),
                        .compact_v = compact_v.get(),
                        .batch = static_cast<int>(sequences.size()),
                        .num_kv_heads = c.kv_heads,
                        .group = c.group,
                        .head_dim = c.head_dim,
                        .window = c.window,
                        .shift = c.shift,
                        .num_rows = rows,
                        .band_rows = band,
                        .compact_rows = compact,
                        .max_band = max_band};
  const DeviceArray<uint8_t> scratch(DmsPrefillScratchBytes(batch));
  batch.scratch = scratch.get();
  absl::Status status = LaunchDmsPrefillCompact({.batch = batch,
                                                 .format = c.format,
                                                 .k = k.get(),
                                                 .v = v.get(),
                                                 .kv_stride = static_cast<int64_t>(kv),
                                                 .decisions = decisions.get(),
                                                 .prefix_evict = prefix_evict.get(),
                                                 .rows = flat.get()},
                                                nullptr);
  EXPECT_TRUE(status.ok()) << status;
  status = LaunchDmsPrefillAttention({.batch = batch,
                                      .q = q.get(),
                                      .q_stride = static_cast<int64_t>(heads),
                                      .out = out.get(),
                                      .scale = scale,
                                      .portable = portable},
                                     nullptr);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());

  const std::vector<Bf16> all_out = out.Get(), all_k = band_k.Get(), all_v = band_v.Get();
  const std::vector<uint8_t> all_rows = flat.Get();
  scratch.Get();
  compact_k.Get();
  compact_v.Get();
  DeviceResult result;
  const auto cut = [](const auto& x, size_t at, size_t n) {
    return std::decay_t<decltype(x)>(x.begin() + static_cast<int64_t>(at),
                                     x.begin() + static_cast<int64_t>(at + n));
  };
  for (const DmsPrefillSequence& at : places) {
    const size_t chunk = Size(at.num_tokens), row = Size(at.row);
    const size_t band_row = Size(at.band_row + at.num_prefix);
    result.out.push_back(cut(all_out, row * heads, chunk * heads));
    result.band_k.push_back(cut(all_k, band_row * kv, chunk * kv));
    result.band_v.push_back(cut(all_v, band_row * kv, chunk * kv));
    result.rows.push_back(
        cut(all_rows, row * Size(c.kv_heads) * row_bytes, chunk * Size(c.kv_heads) * row_bytes));
    for (const Bf16 x : cut(all_out, (row + chunk) * heads, Size(kGap) * heads)) {
      EXPECT_EQ(x.bits, 0xffff) << "a row of nobody was written";
    }
  }
  return result;
}

class DmsPrefillGpu : public testing::TestWithParam<PrefillCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};

float Largest(const std::vector<Bf16>& x) {
  float largest = 0.0f;
  for (const Bf16 value : x) largest = std::max(largest, std::fabs(ToFloat(value)));
  return largest;
}

float LongestVector(const std::vector<Bf16>& x, size_t dim) {
  float longest = 0.0f;
  for (size_t i = 0; i < x.size(); i += dim) {
    float sum = 0.0f;
    for (size_t d = 0; d < dim; ++d) sum += ToFloat(x[i + d]) * ToFloat(x[i + d]);
    longest = std::max(longest, std::sqrt(sum));
  }
  return longest;
}

TEST_P(DmsPrefillGpu, EqualsTheCpu) {
  const PrefillCase& c = GetParam();
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  std::vector<SequenceInputs> inputs;
  for (const Sequence& s : c.sequences) {
    inputs.push_back(MakeInputs(c, s.prefix + s.chunk, static_cast<uint32_t>(inputs.size() + 1)));
  }
  std::vector<const SequenceInputs*> all;
  for (const SequenceInputs& in : inputs) all.push_back(&in);
  for (const bool portable : {true, false}) {
    SCOPED_TRACE(portable ? "portable" : "best");
    const DeviceResult got = RunOnDevice(c, c.sequences, all, scale, portable);
    for (size_t n = 0; n < inputs.size(); ++n) {
      SCOPED_TRACE("sequence " + std::to_string(n));
      const SequenceInputs& in = inputs[n];
      const int tokens = c.sequences[n].prefix + c.sequences[n].chunk;
      const auto tail = [](const auto& x, size_t count) {
        return std::decay_t<decltype(x)>(x.end() - static_cast<int64_t>(count), x.end());
      };
      EXPECT_TRUE(got.rows[n] == tail(in.rows, got.rows[n].size())) << "flat rows";
      EXPECT_TRUE(got.band_k[n] == tail(in.stored_k, got.band_k[n].size())) << "rounded keys";
      EXPECT_TRUE(got.band_v[n] == tail(in.stored_v, got.band_v[n].size())) << "rounded values";

      // Both read the same BF16 values, so what differs is: weights rounded to BF16,
      // 2^-9 each and so 2^-9 of the largest value; the output's rounding, 2^-9 of it;
      // float32 sums of dim products (a score moves by dim 2^-23 of the norms' product,
      // an output by twice that of the largest value) and of `tokens` weights.
      const size_t dim = Size(c.head_dim);
      const float v = Largest(in.stored_v);
      const float score_error = static_cast<float>(dim) * 0x1p-23f * scale *
                                LongestVector(in.q, dim) * LongestVector(in.stored_k, dim);
      const float base = v * (0x1p-9f + 2.0f * score_error + static_cast<float>(tokens) * 0x1p-23f);
      const std::vector<float> want = tail(CpuAttention(c, in, tokens, scale), got.out[n].size());
      int wrong = 0;
      float worst = 0.0f;
      for (size_t i = 0; i < want.size(); ++i) {
        const float error = std::fabs(ToFloat(got.out[n][i]) - want[i]);
        const bool good = error <= base + 0x1p-9f * std::fabs(want[i]);  // false for NaN
        if (!good && wrong++ < 3) {
          const size_t heads = Size(c.kv_heads * c.group);
          ADD_FAILURE() << "token " << i / dim / heads << " head " << i / dim % heads << " dim "
                        << i % dim << ": " << ToFloat(got.out[n][i]) << ", not " << want[i];
        }
        worst = std::max(worst, error);
      }
      EXPECT_EQ(wrong, 0) << "of " << want.size() << ", worst error " << worst << ", bound "
                          << base;

      // Alone, and so again: the same bits.
      const DeviceResult alone = RunOnDevice(c, {c.sequences[n]}, {&in}, scale, portable);
      EXPECT_TRUE(alone.out[0] == got.out[n]) << "depends on its batch mates, or on chance";
    }
  }
}

// What is looked at before anything is enqueued; needs no device.
TEST(DmsPrefillParams, RefusesWhatItCannotDo) {
  alignas(256) static uint8_t memory[256];
  auto* values = reinterpret_cast<Bf16*>(memory);
  const DmsPrefillBatch good{.sequences = reinterpret_cast<DmsPrefillSequence*>(memory),
                             .band_k = values,
                             .band_v = values,
                             .compact_k = values,
                             .compact_v = values,
                             .scratch = memory,
                             .batch = 1,
                             .num_kv_heads = 2,
                             .group = 3,
                             .head_dim = 64,
                             .window = 1,
                             .num_rows = 5,
                             .band_rows = 6,
                             .compact_rows = 14,
                             .max_band = 6};
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
  compact.kv_stride = 127;
  EXPECT_EQ(ValidateDmsPrefillCompact(compact).code(), invalid);
  compact.kv_stride = 128;
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
};

INSTANTIATE_TEST_SUITE_P(All, DmsPrefillGpu, testing::ValuesIn(kCases),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
