#include "tests/kernels/dms_prefill_case.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "kernels/cuda/dms_prefill.h"
#include "kernels/dms_prefill_attention.h"

namespace winnow::kernels {
namespace {

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

}  // namespace

PrefillInputs MakePrefillInputs(const PrefillCase& c, int tokens, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  const auto fill = [&](int heads, float sigma) {
    std::vector<Bf16> x(Size(tokens) * Size(heads) * Size(c.head_dim));
    for (Bf16& value : x) value = ToBf16(sigma * normal(rng));
    return x;
  };
  PrefillInputs in;
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
  // Scales of few bits, at which quotients are e4m3 codes, or every sixth halfway between two.
  for (size_t i = 3; i < vectors; i += 7) {
    const float few = static_cast<float>(1 + 2 * (i / 7 % 8)), unit = few * 0x1p-12f;  // the scale
    in.k[i * dim] = ToBf16(448.0f * unit);
    for (size_t d = 1; d < dim; ++d) {
      float units = static_cast<float>(8 + d % 8);
      if (d % 6 == 0 && (17.0f + 2.0f * static_cast<float>(d / 6 % 8)) * few < 256.0f) {
        units = 17.0f + 2.0f * static_cast<float>(d / 6 % 8);
      }
      in.k[i * dim + d] = ToBf16(units * unit * (d % 2 == 0 ? 0.25f : -1.0f));
    }
  }
  for (size_t i = 0; i < std::min(vectors, 16 * Size(c.kv_heads)) * dim && c.sink != 1.0f; ++i) {
    in.k[i] = ToBf16(c.sink * ToFloat(in.k[i]));
  }
  in.decisions.resize(vectors);
  for (size_t i = 0; i < vectors; ++i) {
    const double rate = c.evict_rate <= 0.0 || c.evict_rate >= 1.0
                            ? c.evict_rate
                            : c.evict_rate - 0.05 * static_cast<double>(i % Size(c.kv_heads));
    in.decisions[i] = uniform(rng) < rate ? 1 : 0;
  }
  StorePrefillInputs(c, &in);
  return in;
}

void StorePrefillInputs(const PrefillCase& c, PrefillInputs* in) {
  const size_t dim = Size(c.head_dim), vectors = in->k.size() / dim;
  const size_t row_bytes = TokenBytes(c.format, c.head_dim);
  in->rows.resize(vectors * row_bytes);
  in->stored_k.resize(vectors * dim);
  in->stored_v.resize(vectors * dim);
  std::vector<float> k(dim), v(dim);
  for (size_t i = 0; i < vectors; ++i) {
    for (size_t d = 0; d < dim; ++d) {
      k[d] = ToFloat(in->k[i * dim + d]);
      v[d] = ToFloat(in->v[i * dim + d]);
    }
    uint8_t* row = &in->rows[i * row_bytes];
    StoreRow(c.format, c.head_dim, k.data(), v.data(), row);
    const TokenRef token = RowToken(c.format, c.head_dim, row);
    LoadK(c.format, c.head_dim, token, k.data());
    LoadV(c.format, c.head_dim, token, v.data());
    for (size_t d = 0; d < dim; ++d) {
      in->stored_k[i * dim + d] = ToBf16(k[d]);
      in->stored_v[i * dim + d] = ToBf16(v[d]);
    }
  }
}

std::vector<float> CpuPrefill(const PrefillCase& c, const PrefillInputs& in,
                              const std::vector<Bf16>& v, float scale) {
  const size_t dim = Size(c.head_dim), vectors = v.size() / dim;
  const int tokens = static_cast<int>(vectors) / c.kv_heads;
  std::vector<uint8_t> rows(vectors * dim * 4);
  for (size_t i = 0; i < vectors; ++i) {
    std::memcpy(&rows[i * dim * 4], &in.stored_k[i * dim], dim * 2);
    std::memcpy(&rows[i * dim * 4 + dim * 2], &v[i * dim], dim * 2);
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

DevicePrefill RunPrefill(const PrefillCase& c, const std::vector<PrefillSequence>& sequences,
                         const std::vector<const PrefillInputs*>& inputs, float scale,
                         bool portable) {
  constexpr int kGap = 3, kBandGap = 8;
  const size_t dim = Size(c.head_dim), kv = Size(c.kv_heads) * dim, heads = Size(c.group) * kv;
  std::vector<DmsPrefillSequence> places;
  int rows = 0, band = 0, compact = 0, max_band = 0;
  for (const PrefillSequence& s : sequences) {
    const int prefix = std::min(s.prefix, c.window);
    places.push_back({rows, s.chunk, band, prefix, compact});
    rows += s.chunk + kGap;
    band += prefix + s.chunk + kBandGap;
    compact += s.prefix + s.chunk + 8;
    max_band = std::max(max_band, prefix + s.chunk);
  }
  const size_t row_bytes = TokenBytes(c.format, c.head_dim);
  // The rows of q, k and v, or one matrix whose rows have all three, each at 16 bytes past 32.
  const size_t q_stride = c.one_matrix ? heads + 2 * kv + 16 : heads;
  const size_t kv_stride = c.one_matrix ? q_stride : kv;
  DeviceArray<Bf16> q(Size(rows) * q_stride), own_k(Size(rows) * kv), own_v(Size(rows) * kv);
  const auto put = [&](DeviceArray<Bf16>* own, size_t offset, size_t row, const Bf16* x, size_t n,
                       size_t width) {
    if (!c.one_matrix) return own->Put(row * width, x, n * width);
    for (size_t i = 0; i < n; ++i) q.Put((row + i) * q_stride + offset, x + i * width, width);
  };
  const size_t k_offset = 8 + heads, v_offset = k_offset + kv;
  DeviceArray<Bf16> out(Size(rows) * heads), band_k(Size(band) * kv), band_v(Size(band) * kv);
  DeviceArray<Bf16> compact_k(Size(compact) * kv), compact_v(Size(compact) * kv);
  DeviceArray<uint8_t> decisions(Size(rows) * Size(c.kv_heads));
  DeviceArray<uint8_t> prefix_evict(Size(band) * Size(c.kv_heads));
  DeviceArray<uint8_t> flat(Size(rows) * Size(c.kv_heads) * row_bytes);
  std::vector<int32_t> num_survivors;
  for (size_t n = 0; n < sequences.size(); ++n) {
    const PrefillInputs& in = *inputs[n];
    const DmsPrefillSequence& at = places[n];
    const size_t chunk = Size(at.num_tokens), prefix = Size(sequences[n].prefix);
    const size_t band_start = prefix - Size(at.num_prefix);
    put(&q, 8, Size(at.row), &in.q[prefix * heads], chunk, heads);
    put(&own_k, k_offset, Size(at.row), &in.k[prefix * kv], chunk, kv);
    put(&own_v, v_offset, Size(at.row), &in.v[prefix * kv], chunk, kv);
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
  absl::Status status =
      LaunchDmsPrefillCompact({.batch = batch,
                               .format = c.format,
                               .k = c.one_matrix ? q.get() + k_offset : own_k.get(),
                               .v = c.one_matrix ? q.get() + v_offset : own_v.get(),
                               .kv_stride = static_cast<int64_t>(kv_stride),
                               .decisions = decisions.get(),
                               .prefix_evict = prefix_evict.get(),
                               .rows = flat.get()},
                              nullptr);
  EXPECT_TRUE(status.ok()) << status;
  status = LaunchDmsPrefillAttention({.batch = batch,
                                      .q = c.one_matrix ? q.get() + 8 : q.get(),
                                      .q_stride = static_cast<int64_t>(q_stride),
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
  DevicePrefill result;
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

}  // namespace winnow::kernels
