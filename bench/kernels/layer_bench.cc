// Where a layer's time goes on the CPU: every op of one transformer layer of
// SmolLM2-135M's shape, for a prefill chunk without a prefix or, with a depth,
// for a decode step of `tokens` sequences that hold `depth` live tokens a head.
// Microseconds an op, best of several repetitions, and the share of the sum.
// One layer's weights and cache stay in the caches: a model's do not.
//
//   layer_bench [threads] [tokens] [FORMAT] [depth]     default: 2 512 fp8 0
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "common/base/thread_pool.h"
#include "kernels/compact_decode_attention.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/dms_compact.h"
#include "kernels/dms_prefill_attention.h"
#include "kernels/gemm.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"

namespace winnow::kernels {
namespace {

constexpr int kHidden = 576, kHeads = 9, kKvHeads = 3, kHeadDim = 64, kIntermediate = 1536;
constexpr int kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;

double BestUs(const std::function<absl::Status()>& op) {
  double best = 1e12, total = 0.0;
  for (int i = 0; i < 5 || total < 0.3e6; ++i) {
    const auto start = std::chrono::steady_clock::now();
    if (const absl::Status status = op(); !status.ok()) {
      std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
      std::exit(1);
    }
    const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - start;
    best = std::min(best, us.count());
    total += us.count();
  }
  return best;
}

std::vector<float> RandomFloats(size_t size, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(rng);
  return values;
}

PackedMatrix RandomMatrix(int n, int k) {
  const std::vector<float> values = RandomFloats(static_cast<size_t>(n) * k, 7);
  std::vector<Bf16> w(values.size());
  std::transform(values.begin(), values.end(), w.begin(), ToBf16);
  return PackedMatrix::Pack(w.data(), n, k);
}

// Spans of `depth` live tokens, all survivors, on pages of their own.
class DeepSpans {
 public:
  DeepSpans(KvFormatId format, int num_spans, int depth) : spans_(num_spans) {
    layout_.format = format;
    layout_.head_dim = kHeadDim;
    layout_.page_bytes = PageBytes(kHeadDim);
    layout_.slots_per_page = SlotsPerPage(format, kHeadDim);
    const int pages_each = (depth + layout_.slots_per_page - 1) / layout_.slots_per_page;
    memory_ = AlignedBuffer<uint8_t>(layout_.page_bytes * num_spans * pages_each);
    layout_.pages = memory_.data();
    const std::vector<float> kv = RandomFloats(2 * kHeadDim, 3);
    row_.resize(TokenBytes(format, kHeadDim));
    StoreRow(format, kHeadDim, kv.data(), kv.data() + kHeadDim, row_.data());
    const int segments_each = (pages_each + kSegmentPages - 1) / kSegmentPages;
    segments_.resize(static_cast<size_t>(num_spans) * segments_each);
    for (int s = 0; s < num_spans; ++s) {
      Span& span = spans_[s];
      PageSegment* segments = segments_.data() + s * segments_each;
      for (int i = 0; i < pages_each; ++i) {
        segments[i / kSegmentPages].page[i % kSegmentPages] = s * pages_each + i;
      }
      for (int i = 0; i + 1 < segments_each; ++i) segments[i].next = segments + i + 1;
      span.survivors = {
          .head = segments, .tail = segments + segments_each - 1, .num_pages = pages_each};
      span.newest = row_.data();
      span.num_survivors = depth - 1;
      span.num_tokens = depth;
      for (int t = 0; t < depth - 1; ++t) {
        CopyRowToPage(format, kHeadDim, row_.data(),
                      layout_.Page(span.survivors.At(t / layout_.slots_per_page)),
                      t % layout_.slots_per_page);
      }
    }
    for (int s = 0; s < num_spans; s += kKvHeads) sequences_.push_back(&spans_[s]);
  }

  const KvLayout& layout() const { return layout_; }
  const Span* const* sequences() const { return sequences_.data(); }

 private:
  KvLayout layout_;
  AlignedBuffer<uint8_t> memory_;
  std::vector<uint8_t> row_;
  std::vector<PageSegment> segments_;
  std::vector<Span> spans_;
  std::vector<const Span*> sequences_;
};

int Main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const int m = argc > 2 ? std::max(1, std::atoi(argv[2])) : 512;
  const KvFormatId format = ParseKvFormat(argc > 3 ? argv[3] : "fp8").value();
  const int depth = argc > 4 ? std::max(0, std::atoi(argv[4])) : 0;
  ThreadPool pool(threads);
  const size_t rows = static_cast<size_t>(m);
  std::vector<float> x = RandomFloats(rows * kHidden, 1);
  const std::vector<float> norm(kHidden, 1.0f);
  std::vector<Bf16> h(rows * kHidden), attention(rows * kHidden), mlp(rows * kIntermediate);
  std::vector<float> qkv(rows * kQkv), q(rows * kHidden), gate_up(rows * 2 * kIntermediate);
  std::vector<uint8_t> kv_rows(rows * kKvHeads * TokenBytes(format, kHeadDim));
  std::vector<int32_t> positions(rows);
  for (int i = 0; i < m; ++i) positions[i] = i;
  const RopeTable rope = BuildRopeTable(kHeadDim, m, 1e5f).value();
  ThreadScratch scratch(threads,
                        AttentionScratchBytes(kHeads, kKvHeads, kHeadDim, std::max(m, depth)));
  const DeepSpans deep(format, depth > 0 ? m * kKvHeads : 0, depth);
  const std::vector<Span> spans(kKvHeads);
  const PackedMatrix w_qkv = RandomMatrix(kQkv, kHidden), w_o = RandomMatrix(kHidden, kHidden),
                     w_gate_up = RandomMatrix(2 * kIntermediate, kHidden),
                     w_down = RandomMatrix(kHidden, kIntermediate);
  const auto gemm = [&](const std::vector<Bf16>& a, const PackedMatrix& w, float* out) {
    GemmParams p;
    p.a_bf16 = a.data();
    p.w = &w;
    p.out = out;
    p.m = m;
    p.lda = w.k();
    p.ldo = w.n();
    return GemmCpu(p, &pool);
  };

  struct Op {
    const char* name;
    std::function<absl::Status()> run;
  };
  const Op ops[] = {
      {"rms_norm",
       [&] {
         RmsNormParams p;
         p.x = x.data();
         p.weight = norm.data();
         p.out_bf16 = h.data();
         p.m = m;
         p.n = kHidden;
         p.ldx = kHidden;
         p.eps = 1e-5f;
         return RmsNormCpu(p, &pool);
       }},
      {"gemm qkv", [&] { return gemm(h, w_qkv, qkv.data()); }},
      {"dms_compact",
       [&] {
         DmsCompactParams p;
         p.q = qkv.data();
         p.k = p.q + kHeads * kHeadDim;
         p.v = p.k + kKvHeads * kHeadDim;
         p.q_stride = p.k_stride = p.v_stride = kQkv;
         p.positions = positions.data();
         p.rope_cos = rope.cos.data();
         p.rope_sin = rope.sin.data();
         p.num_positions = m;
         p.format = format;
         p.q_out = q.data();
         p.rows = kv_rows.data();
         p.num_tokens = m;
         p.num_heads = kHeads;
         p.num_kv_heads = kKvHeads;
         p.head_dim = kHeadDim;
         return DmsCompactCpu(p, &pool);
       }},
      {"attention",
       [&] {
         if (depth > 0) {
           CompactDecodeAttentionParams p;
           p.layout = deep.layout();
           p.spans = deep.sequences();
           p.q = q.data();
           p.out_bf16 = attention.data();
           p.num_seqs = m;
           p.num_heads = kHeads;
           p.num_kv_heads = kKvHeads;
           p.scale = 0.125f;
           p.scratch = &scratch;
           return CompactDecodeAttentionCpu(p, &pool);
         }
         DmsPrefillAttentionParams p;
         p.layout.format = format;
         p.layout.head_dim = kHeadDim;
         p.layout.slots_per_page = SlotsPerPage(format, kHeadDim);
         p.spans = spans.data();
         p.q = q.data();
         p.rows = kv_rows.data();
         p.out_bf16 = attention.data();
         p.num_tokens = m;
         p.num_heads = kHeads;
         p.num_kv_heads = kKvHeads;
         p.scale = 0.125f;
         p.scratch = &scratch;
         return DmsPrefillAttentionCpu(p, &pool);
       }},
      {"gemm o", [&] { return gemm(attention, w_o, x.data()); }},
      {"gemm gate_up", [&] { return gemm(h, w_gate_up, gate_up.data()); }},
      {"swiglu",
       [&] {
         SwiGluParams p;
         p.x = gate_up.data();
         p.out_bf16 = mlp.data();
         p.m = m;
         p.intermediate = kIntermediate;
         p.ldx = 2 * kIntermediate;
         return SwiGluCpu(p, &pool);
       }},
      {"gemm down", [&] { return gemm(mlp, w_down, x.data()); }},
  };
  std::vector<double> us;
  double sum = 0.0;
  for (const Op& op : ops) {
    us.push_back(BestUs(op.run));
    sum += us.back();
  }
  std::printf("%d tokens, depth %d, %d threads, %s, path %s\n", m, depth, threads,
              std::string(KvFormatName(format)).c_str(), GemmPathName());
  for (size_t i = 0; i < us.size(); ++i) {
    std::printf("%-14s %10.1f us %5.1f %%\n", ops[i].name, us[i], 100.0 * us[i] / sum);
  }
  std::printf("%-14s %10.1f us, %.0f tokens/s through 30 layers\n", "layer", sum,
              m / (30.0 * sum * 1e-6));
  return 0;
}

}  // namespace
}  // namespace winnow::kernels

int main(int argc, char** argv) { return winnow::kernels::Main(argc, argv); }
