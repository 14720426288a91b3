// The sparse prefill: JSON lines of microseconds, from roped BF16 Q, K and V to the
// output. Medians of runs that find the L2 cache flushed, on random data.
//   dms_prefill_bench [part of the case names] [runs]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "bench/kernels/bench_memory.cuh"
#include "bench/kernels/fill_random.cuh"
#include "bench/kernels/prefill_work.h"
#include "kernels/cuda/dms_prefill.h"

namespace winnow::kernels {
namespace {

struct BenchCase {
  std::string name;
  int head_dim, seq, window;
  std::vector<double> keep;  // by KV head
};

std::vector<BenchCase> Cases() {
  const auto uniform = [](double rate) { return std::vector<double>(8, rate); };
  std::vector<BenchCase> cases;
  const std::pair<const char*, int> lengths[] = {{"8k", 8192}, {"32k", 32768}, {"128k", 131072}};
  for (const int dim : {128, 64}) {
    for (const auto& [length, seq] : lengths) {
      const std::string tail = "/d" + std::to_string(dim) + "/" + length;
      cases.push_back({"prefill" + tail, dim, seq, 256, uniform(0.125)});
      cases.push_back({"prefill_keep35" + tail, dim, seq, 256, uniform(0.35)});
    }
  }
  cases.push_back({"prefill_w512/d128/32k", 128, 32768, 512, uniform(0.125)});
  cases.push_back({"prefill_dense/d128/8k", 128, 8192, 256, uniform(1.0)});
  cases.push_back({"prefill_dense/d128/32k", 128, 32768, 256, uniform(1.0)});
  cases.push_back(
      {"prefill_mixed/d64/8k", 64, 8192, 256, {.003, .003, .01, .02, .05, .1, .214, .6}});
  // Short ones first: the GPU lowers its clocks for a while after long ones.
  std::stable_sort(cases.begin(), cases.end(), [](const BenchCase& a, const BenchCase& b) {
    return std::pair(a.seq, a.head_dim) < std::pair(b.seq, b.head_dim);
  });
  return cases;
}

class Bench {
 public:
  static constexpr int kKvHeads = 8, kGroup = 4, kMostTokens = 131072, kMostDim = 128;

  Bench() {
    const size_t kv = size_t{kMostTokens} * kKvHeads * kMostDim;
    q_ = memory_.Allocate<Bf16>(kv * kGroup);
    out_ = memory_.Allocate<Bf16>(kv * kGroup);
    for (Bf16** x : {&k_, &v_, &band_k_, &band_v_}) *x = memory_.Allocate<Bf16>(kv);
    for (Bf16** x : {&compact_k_, &compact_v_}) {
      *x = memory_.Allocate<Bf16>(kv + size_t{64} * kKvHeads * kMostDim);
    }
    rows_ = memory_.Allocate<uint8_t>(size_t{kMostTokens} * kKvHeads *
                                      TokenBytes(KvFormatId::kFp8, kMostDim));
    decisions_ = memory_.Allocate<uint8_t>(size_t{kMostTokens} * kKvHeads);
    sequence_ = memory_.Allocate<DmsPrefillSequence>(1);
    uint32_t seed = 1;
    for (Bf16* x : {q_, k_, v_}) {
      const size_t n = x == q_ ? kv * kGroup : kv;
      FillNormal<<<1024, 256>>>(reinterpret_cast<__nv_bfloat162*>(x), static_cast<int64_t>(n / 2),
                                seed++);
    }
    Check(cudaDeviceSynchronize());
  }

  void Run(const BenchCase& c, int runs) {
    std::mt19937 rng(7);
    std::uniform_real_distribution<double> uniform;
    std::vector<uint8_t> decisions(static_cast<size_t>(c.seq) * kKvHeads);
    for (size_t i = 0; i < decisions.size(); ++i) {
      decisions[i] = uniform(rng) < c.keep[i % kKvHeads] ? 0 : 1;
    }
    Check(cudaMemcpy(decisions_, decisions.data(), decisions.size(), cudaMemcpyHostToDevice));
    const DmsPrefillSequence sequence{.num_tokens = c.seq};
    Check(cudaMemcpy(sequence_, &sequence, sizeof(sequence), cudaMemcpyHostToDevice));
    DmsPrefillBatch batch{.sequences = sequence_,
                          .band_k = band_k_,
                          .band_v = band_v_,
                          .compact_k = compact_k_,
                          .compact_v = compact_v_,
                          .batch = 1,
                          .num_kv_heads = kKvHeads,
                          .group = kGroup,
                          .head_dim = c.head_dim,
                          .window = c.window,
                          .shift = 1,
                          .num_rows = c.seq,
                          .band_rows = c.seq,
                          .compact_rows = c.seq + 8,
                          .max_band = c.seq};
    BenchMemory scratch;
    batch.scratch = scratch.Allocate<uint8_t>(DmsPrefillScratchBytes(batch));
    const int64_t kv = int64_t{kKvHeads} * c.head_dim;
    const DmsPrefillCompactParams compact{.batch = batch,
                                          .format = KvFormatId::kFp8,
                                          .k = k_,
                                          .v = v_,
                                          .kv_stride = kv,
                                          .decisions = decisions_,
                                          .rows = rows_};
    const DmsPrefillCudaParams attention{.batch = batch,
                                         .q = q_,
                                         .q_stride = kv * kGroup,
                                         .out = out_,
                                         .scale = 1.0f / std::sqrt(float(c.head_dim))};
    timer_.set_runs(runs);
    const double both = timer_.Median([&] {
      Check(LaunchDmsPrefillCompact(compact, nullptr));
      Check(LaunchDmsPrefillAttention(attention, nullptr));
    });
    const double first = timer_.Median([&] { Check(LaunchDmsPrefillCompact(compact, nullptr)); });

    const PrefillWork work =
        WorkOfPrefill(c.seq, c.window, c.head_dim, kKvHeads, kGroup, decisions);
    std::printf(
        "{\"case\": \"%s\", \"ours_us\": %.2f, \"compact_us\": %.2f, \"flop\": %.6g, "
        "\"bytes\": %.6g, \"compact_bytes\": %.6g}\n",
        c.name.c_str(), both, first, work.flop, work.compact_bytes + work.attention_bytes,
        work.compact_bytes);
    std::fflush(stdout);
  }

 private:
  BenchMemory memory_;
  BenchTimer timer_;
  Bf16 *q_, *k_, *v_, *out_, *band_k_, *band_v_, *compact_k_, *compact_v_;
  uint8_t *rows_, *decisions_;
  DmsPrefillSequence* sequence_;
};

}  // namespace
}  // namespace winnow::kernels

int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "";
  const int runs = argc > 2 ? std::max(1, std::atoi(argv[2])) : 15;
  winnow::kernels::Bench bench;
  for (const auto& c : winnow::kernels::Cases()) {
    if (c.name.find(part) != std::string::npos) bench.Run(c, c.seq > 100000 ? runs / 3 + 1 : runs);
  }
}
