#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/base/bf16.h"
#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/dms_prefill.h"
#include "kernels/dms_compact.h"
#include "kernels/rope.h"
#include "tests/kernels/device_span_case.h"

namespace winnow::kernels {

constexpr size_t Size(int n) { return static_cast<size_t>(n); }

struct CacheCase {
  std::string name;
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 128, group = 2, num_kv_heads = 2, window = 20, shift = 1;
  DecisionRule rule = {
      .source = DecisionSource::kBorrowedAfterQNorm, .scale = 1.0f, .offset = 0.3f};
  // [round][sequence of the cache]: tokens of its chunk; 0: not in the batch.
  std::vector<std::vector<int>> rounds = {{70, 1, 21}, {131, 0, 1}, {1, 40, 20}, {3, 150, 2}};
  int max_tokens = 400;  // of a sequence, with all that follows the rounds
  int strays = 1;        // sequences of no cache in every batch
  friend void PrintTo(const CacheCase& c, std::ostream* os) { *os << c.name; }
};

// What a sequence has seen in one layer, for attention over all of it at once.
struct History {
  std::vector<Bf16> q, k, v;  // as attention reads them
  std::vector<uint8_t> decisions;
};

// The chunks of one layer and call; the sequences of no cache (slot -1) come first.
struct ChunkBatch {
  std::vector<DmsPrefillSequence> places;
  std::vector<int32_t> slots;      // [places]
  std::vector<int32_t> positions;  // [rows]
  std::vector<Bf16> qkv;           // [rows, row]
  int rows = 0, band = 0, compact = 0, max_band = 0;
};

// What the device made of them.
struct ChunkResult {
  std::vector<Bf16> band_k, band_v, compact_k, compact_v;  // after the prefix was loaded
  std::vector<uint8_t> prefix_evict;
  std::vector<int32_t> num_survivors;
  std::vector<Bf16> q, out;
};

// A cache of kLayers layers and kSequences sequences twice, on the device and for the CPU ops.
class PrefixCacheGpu : public testing::TestWithParam<CacheCase> {
 protected:
  static constexpr int kLayers = 2, kSequences = 3;

  void SetUp() override;

  // A chunk of tokens[s] tokens of each sequence through a layer of both.
  void RunLayer(int layer, const std::vector<int>& tokens);
  // All sequences, a token a step, through both.
  void DecodeSteps(int steps);
  // Every stored byte, counter and flag; every page is held once.
  void CheckCache(const std::string& when);

  std::unique_ptr<DeviceSpanCase> spans_;
  std::unique_ptr<DeviceArray<int32_t>> free_pages_, num_free_, exhausted_;

 private:
  ChunkBatch MakeBatch(int layer, const std::vector<int>& tokens);
  void RunOnDevice(int layer, const ChunkBatch& chunks, ChunkResult* result);
  // The CPU's turn, against `result`.
  void RunOnCpu(int layer, const ChunkBatch& chunks, const ChunkResult& result);
  void CheckLoaded(const ChunkBatch& chunks, const ChunkResult& result, size_t n, int g,
                   const Span& span);
  void CheckAttention(int layer, int sequence, const std::vector<Bf16>& out);
  void Remember(History* history, const uint8_t* row, uint8_t decision);

  std::vector<float> Random(size_t n);
  DevicePagePool pool() const { return {free_pages_->get(), num_free_->get(), exhausted_->get()}; }
  DmsCompactParams CpuParams(const float* qkv, const int32_t* positions, int n) const;
  void AttachPages(Span* span, const PageNeed& need);

  std::mt19937 rng_{11};
  int slots_per_page_ = 0, num_pages_ = 0;
  size_t dim_ = 0, kv_ = 0, heads_ = 0, row_ = 0, row_bytes_ = 0;
  std::vector<int32_t> cpu_free_;
  std::vector<float> q_norm_, k_norm_;
  RopeTable rope_;
  std::unique_ptr<DeviceArray<float>> d_q_norm_, d_k_norm_, d_cos_, d_sin_;
  std::vector<History> history_;  // [layer, sequence]
};

}  // namespace winnow::kernels
