// The token path, the padded prefill's primitives and packing: JSON lines of microseconds with
// the bytes that must move and their share of this run's own device-to-device copy. Random data;
// medians of runs that find the L2 cache flushed, but rows named /b64 of the element-wise ops are
// the mean of 20 launches in a graph, whose inputs the L2 cache has after the first.
//   token_path_bench [part of the case names] [runs]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "bench/kernels/bench_memory.cuh"
#include "kernels/cuda/crc32c.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/kv_pack.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/swiglu.h"
#include "kernels/prefill_primitives.h"

namespace winnow::kernels {
namespace {

__global__ void FillBits(uint32_t* out, int64_t n, uint32_t mask, uint32_t bits) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * int64_t{256}) {
    uint64_t x = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 32)) * 0xbf58476d1ce4e5b9ull;
    out[i] = (static_cast<uint32_t>(x >> 32) & mask) | bits;
  }
}

// Random words, made floats of 1 to 2 and their negatives by the defaults.
template <typename T>
T* Random(BenchMemory& memory, size_t n, uint32_t mask = 0x807fffff, uint32_t bits = 0x3f800000) {
  const size_t words = (n * sizeof(T) + 3) / 4;
  uint32_t* p = memory.Allocate<uint32_t>(words);
  FillBits<<<1024, 256>>>(p, static_cast<int64_t>(words), mask, bits);
  Check(cudaGetLastError());
  return reinterpret_cast<T*>(p);
}

class Bench {
 public:
  Bench(std::string filter, int runs)
      : filter_(std::move(filter)), stream_(NewStream()), timer_(runs, stream_) {
    constexpr double kBytes = size_t{512} << 20;
    const double us = timer_.CopyUs(kBytes);
    copy_gbps_ = kBytes / us / 1e3;
    std::printf("{\"case\": \"token/copy\", \"ours_us\": %.2f, \"gbps\": %.1f}\n", us, copy_gbps_);
  }

  cudaStream_t stream() const { return stream_; }

  // `bytes` are those that must be read and written.
  void Flushed(const std::string& name, double bytes, const std::function<void()>& launch) {
    if (Wanted(name)) Print(name, bytes, timer_.Median(launch));
  }
  void InGraph(const std::string& name, double bytes, const std::function<void()>& launch) {
    if (!Wanted(name)) return;
    constexpr int kLaunches = 20;
    const double us = timer_.GraphMedian([&] {
      for (int i = 0; i < kLaunches; ++i) launch();
    });
    Print(name, bytes, us / kLaunches);
  }

 private:
  static cudaStream_t NewStream() {
    cudaStream_t stream;
    Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
  bool Wanted(const std::string& name) const { return name.find(filter_) != std::string::npos; }
  void Print(const std::string& name, double bytes, double us) {
    std::printf(
        "{\"case\": \"token/%s\", \"ours_us\": %.2f, \"bytes\": %.0f, \"pct_of_copy\": %.1f}\n",
        name.c_str(), us, bytes, 100.0 * bytes / us / 1e3 / copy_gbps_);
    std::fflush(stdout);
  }

  const std::string filter_;
  const cudaStream_t stream_;
  BenchTimer timer_;
  double copy_gbps_ = 0;
};

// 8192 rows of a prefill and 64 of a decode step, Qwen3-8B's widths.
void RunElementwise(Bench& bench) {
  BenchMemory memory;
  constexpr int kVocab = 151936, kHidden = 4096, kInner = 12288, kTokens = 8192, kSeqs = 64;
  const double tokens = kTokens, seqs = kSeqs;
  float* x = Random<float>(memory, size_t{kTokens} * kHidden);
  float* weight = Random<float>(memory, kHidden);
  Bf16* add = Random<Bf16>(memory, size_t{kTokens} * kHidden, 0x807f807f, 0x3f803f80);
  Bf16* out = Random<Bf16>(memory, size_t{kTokens} * kInner);
  Bf16* gate_up = Random<Bf16>(memory, size_t{kTokens} * 2 * kInner, 0x807f807f, 0x3f803f80);
  Bf16* table = Random<Bf16>(memory, size_t{kVocab} * kHidden, 0x807f807f, 0x3f803f80);
  std::vector<int32_t> ids(kTokens);
  std::mt19937 rng(1);
  for (int32_t& id : ids) id = static_cast<int32_t>(rng() % kVocab);
  const int32_t* d_ids = memory.Upload(ids);
  Check(cudaDeviceSynchronize());
  const auto embed = [&](int m) {
    Check(LaunchEmbedding({table, d_ids, x, m, kVocab, kHidden}, bench.stream()));
  };
  const auto norm = [&](int m) {
    Check(LaunchRmsNorm({.x = x,
                         .add_bf16 = add,
                         .residual = x,
                         .weight = weight,
                         .out_bf16 = out,
                         .m = m,
                         .n = kHidden,
                         .ldx = kHidden,
                         .eps = 1e-6f},
                        bench.stream()));
  };
  const auto swiglu = [&](int m) {
    Check(LaunchSwiGlu(
        {.x_bf16 = gate_up, .out_bf16 = out, .m = m, .intermediate = kInner, .ldx = 2 * kInner},
        bench.stream()));
  };
  bench.Flushed("embedding/8k", tokens * kHidden * 6, [&] { embed(kTokens); });
  bench.Flushed("rms_norm_add/8k", tokens * kHidden * 12, [&] { norm(kTokens); });
  bench.Flushed("swiglu/8k", tokens * kInner * 6, [&] { swiglu(kTokens); });
  bench.InGraph("embedding/b64", seqs * kHidden * 6, [&] { embed(kSeqs); });
  bench.InGraph("rms_norm_add/b64", seqs * kHidden * 12, [&] { norm(kSeqs); });
  bench.InGraph("swiglu/b64", seqs * kInner * 6, [&] { swiglu(kSeqs); });
}

// Four padded sequences of 8192 positions, 8 heads of 128 BF16 channels (256 bytes); a half of the
// positions set. And flags of four bytes.
void RunPrimitives(Bench& bench) {
  BenchMemory memory;
  constexpr int kBatch = 4, kHeads = 8, kSeq = 8192, kRows = kBatch * kHeads;
  for (const size_t row_bytes : {size_t{256}, size_t{4}}) {
    const std::string tail = row_bytes == 4 ? "/flags" : "/d128";
    const size_t size = size_t{kRows} * kSeq * row_bytes;
    uint8_t* in = Random<uint8_t>(memory, size);
    uint8_t* out = Random<uint8_t>(memory, size);
    std::vector<uint8_t> mask(size_t{kRows} * kSeq);
    std::vector<int32_t> lens(kRows), ids(mask.size());
    std::mt19937 rng(2);
    for (uint8_t& m : mask) m = rng() % 2;
    double set = 0, set_of_first = 0;
    for (size_t i = 0; i < mask.size(); ++i) {
      if (mask[i] == 0) continue;
      const size_t row = i / kSeq;
      ids[row * kSeq + static_cast<size_t>(lens[row]++)] = static_cast<int32_t>(i % kSeq);
      set += 1;
      if (row < kBatch) set_of_first += 1;
    }
    const uint8_t* d_mask = memory.Upload(mask);
    const int32_t* d_lens = memory.Upload(lens);
    const int32_t* d_ids = memory.Upload(ids);
    int32_t* idx = Random<int32_t>(memory, mask.size());
    int32_t* counts = Random<int32_t>(memory, kRows);
    Check(cudaDeviceSynchronize());
    const double row = static_cast<double>(row_bytes), whole = static_cast<double>(size);
    bench.Flushed("left_pad_2d" + tail, whole + set * row, [&] {
      Check(LaunchLeftPad2d({in, d_lens, out, kRows, kSeq, row_bytes}, bench.stream()));
    });
    bench.Flushed("scatter_by_index" + tail, whole + set * (row + 4), [&] {
      Check(LaunchScatterByIndex({in, d_ids, d_lens, out, kRows, kSeq, kSeq, kSeq, row_bytes},
                                 bench.stream()));
    });
    bench.Flushed(
        "bool_gather_left_pad" + tail, whole + set_of_first * kHeads * row + 5.0 * kBatch * kSeq,
        [&] {
          Check(LaunchBoolGatherLeftPad(
              {in, d_mask, out, idx, counts, kBatch, kHeads, kSeq, row_bytes}, bench.stream()));
        });
    bench.Flushed("compact_by_bool" + tail, 2 * whole + double{kRows} * kSeq, [&] {
      Check(LaunchCompactByBool({in, d_mask, out, counts, kRows, kSeq, row_bytes}, bench.stream()));
    });
    memory.Free();
  }
}

// Logits like a model's: normal, of standard deviation 2.5.
__global__ void FillNormal(float* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * int64_t{256}) {
    uint64_t x = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 32)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 29)) * 0x94d049bb133111ebull;
    const float a = static_cast<float>(x >> 32) * 0x1p-32f + 1e-9f;
    const float b = static_cast<float>(x & 0xffffffffu) * 0x1p-32f;
    out[i] = 2.5f * sqrtf(-2.0f * logf(a)) * cospif(2.0f * b);
  }
}

void RunSample(Bench& bench) {
  BenchMemory memory;
  constexpr int kVocab = 151936, kMostRows = 256;
  float* logits = Random<float>(memory, size_t{kMostRows} * kVocab);
  FillNormal<<<2048, 256>>>(logits, int64_t{kMostRows} * kVocab);
  Check(cudaGetLastError());
  std::vector<SampleKey> keys(kMostRows);
  for (size_t i = 0; i < keys.size(); ++i) keys[i].seed = i;
  SampleKey* d_keys = memory.Upload(keys);
  int32_t* tokens = Random<int32_t>(memory, kMostRows);
  const std::pair<const char*, SamplingParams> modes[] = {
      {"greedy", {}},
      {"temperature", {.temperature = 1.0f}},
      {"top_k50", {.temperature = 1.0f, .top_k = 50}},
      {"top_p95", {.temperature = 0.6f, .top_p = 0.95f}},
      {"top_k20_p95", {.temperature = 0.6f, .top_k = 20, .top_p = 0.95f}},
  };
  for (const auto& [mode, params] : modes) {
    const SamplingParams* d_params = memory.Upload(std::vector<SamplingParams>(kMostRows, params));
    Check(cudaDeviceSynchronize());
    for (const int rows : {1, 64, 256}) {
      bench.Flushed("sample_" + std::string(mode) + "/b" + std::to_string(rows),
                    4.0 * rows * kVocab, [&, d = d_params, m = rows] {
                      Check(LaunchSample({.logits = logits,
                                          .params = d,
                                          .keys = d_keys,
                                          .tokens = tokens,
                                          .num_rows = m,
                                          .vocab = kVocab,
                                          .ld = kVocab,
                                          .advance = true},
                                         bench.stream()));
                    });
    }
  }
}

// A sequence of 8K: 36 layers of 8 heads, window 256, an eighth of the older tokens kept, fp8, 128
// channels, pages at random places.
void RunPack(Bench& bench) {
  BenchMemory memory;
  constexpr int kLayers = 36, kHeads = 8, kDim = 128, kWindow = 256, kSurvivors = 991;
  DeviceSpans spans{.head_dim = kDim,
                    .window = kWindow,
                    .num_layers = kLayers,
                    .max_sequences = 1,
                    .num_kv_heads = kHeads};
  const int slots = spans.slots_per_page(), ring = spans.ring_pages_per_span();
  spans.max_survivor_pages = (kSurvivors + slots - 1) / slots / 4 * 4 + 4;
  const size_t n = static_cast<size_t>(spans.num_spans());
  const size_t survivors = static_cast<size_t>(spans.max_survivor_pages);
  std::vector<int32_t> order(n * (survivors + static_cast<size_t>(ring)));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), std::mt19937(3));
  const auto cut = order.begin() + static_cast<std::ptrdiff_t>(n * survivors);
  spans.pages = Random<uint8_t>(memory, order.size() * PageBytes(kDim));
  spans.state = memory.Upload(std::vector<SpanState>(n, {kSurvivors, kWindow, 100, 8192}));
  spans.survivor_pages = memory.Upload(std::vector<int32_t>(order.begin(), cut));
  spans.ring_pages = memory.Upload(std::vector<int32_t>(cut, order.end()));
  spans.newest = Random<uint8_t>(memory, n * static_cast<size_t>(spans.newest_stride()));
  spans.ring_evict =
      Random<uint8_t>(memory, n * static_cast<size_t>(spans.evict_stride()), 0x01010101, 0);
  const double item = kHeads * (12.0 + (kSurvivors + kWindow + 1) * 260.0 + kWindow);
  const int64_t staging_bytes =
      kLayers * (static_cast<int64_t>(item) + 15) / 16 * 16 + 16 * kLayers;
  uint8_t* staging = Random<uint8_t>(memory, static_cast<size_t>(staging_bytes));
  const int32_t* slot = memory.Upload(std::vector<int32_t>{0});
  const int32_t* num_tokens = memory.Upload(std::vector<int32_t>{8192});
  ByteRange* ranges = memory.Upload(std::vector<ByteRange>(kLayers));
  uint32_t* crc = memory.Upload(std::vector<uint32_t>(kLayers));
  Check(cudaDeviceSynchronize());
  const auto pack = [&](uint32_t* with_crc) {
    Check(LaunchKvPack({.spans = spans,
                        .slots = slot,
                        .num_seqs = 1,
                        .num_layers = kLayers,
                        .staging = staging,
                        .staging_bytes = staging_bytes,
                        .ranges = ranges,
                        .crc = with_crc},
                       bench.stream()));
  };
  pack(crc);
  bench.Flushed("kv_pack/8k", 2 * kLayers * item, [&] { pack(nullptr); });
  bench.Flushed("kv_pack_crc/8k", 2 * kLayers * item, [&] { pack(crc); });
  bench.Flushed("crc32c/8k", kLayers * item, [&] {
    Check(
        LaunchCrc32c({staging, ranges, crc, kLayers, static_cast<int64_t>(item)}, bench.stream()));
  });
  bench.Flushed("kv_unpack/8k", 2 * kLayers * item, [&] {
    Check(LaunchKvUnpack({.spans = spans,
                          .slots = slot,
                          .num_tokens = num_tokens,
                          .num_seqs = 1,
                          .num_layers = kLayers,
                          .staging = staging,
                          .ranges = ranges},
                         bench.stream()));
  });
}

int Main(int argc, char** argv) {
  Bench bench(argc > 1 ? argv[1] : "", argc > 2 ? std::atoi(argv[2]) : 15);
  RunElementwise(bench);
  RunPrimitives(bench);
  RunSample(bench);
  RunPack(bench);
  return 0;
}

}  // namespace
}  // namespace winnow::kernels

int main(int argc, char** argv) { return winnow::kernels::Main(argc, argv); }
