// GFLOP/s and GB/s of the CPU GEMM on one model's shapes, beside what this
// machine can do at all, measured in the same run: multiply-adds that stay in
// registers, and a plain read of memory. The best of several repetitions counts.
//
//   gemm_bench [threads] [rows ...]     default: 2 threads, rows 1 4 8 16 64 512
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "common/base/bf16.h"
#include "common/base/thread_pool.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/cpu_path.h"
#include "kernels/gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace winnow::kernels {
namespace {

double Seconds(const std::function<void()>& fn) {
  const auto start = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The fastest of as many runs as fit into `budget_s`, three at least.
double Best(double budget_s, const std::function<void()>& fn) {
  double best = 1e9, total = 0.0;
  for (int i = 0; i < 3 || total < budget_s; ++i) {
    const double s = Seconds(fn);
    best = std::min(best, s);
    total += s;
  }
  return best;
}

volatile float sink;

#if defined(__x86_64__)
constexpr int kLoops = 200000;
constexpr int kChains = 12;

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void DotLoop() {
  __m512 acc[kChains];
  for (auto& a : acc) a = _mm512_setzero_ps();
  __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (int i = 0; i < kLoops; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], x, x);
    asm volatile("" : "+v"(x));
  }
  for (const auto& a : acc) sink = _mm512_cvtss_f32(a);
}

__attribute__((target("avx512f"))) void Fma512Loop() {
  __m512 acc[kChains];
  for (auto& a : acc) a = _mm512_setzero_ps();
  __m512 x = _mm512_set1_ps(1.0f);
  for (int i = 0; i < kLoops; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = _mm512_fmadd_ps(x, x, acc[c]);
    asm volatile("" : "+v"(x));
  }
  for (const auto& a : acc) sink = _mm512_cvtss_f32(a);
}

__attribute__((target("avx2,fma"))) void Fma256Loop() {
  __m256 acc[kChains];
  for (auto& a : acc) a = _mm256_setzero_ps();
  __m256 x = _mm256_set1_ps(1.0f);
  for (int i = 0; i < kLoops; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = _mm256_fmadd_ps(x, x, acc[c]);
    asm volatile("" : "+x"(x));
  }
  for (const auto& a : acc) sink = _mm256_cvtss_f32(a);
}

// The path's peak in GFLOP/s over all threads.
double PeakGflops(CpuPath path, ThreadPool* pool) {
  if (path == CpuPath::kScalar) return 0.0;
  const double s = Best(0.3, [&] {
    pool->ParallelFor(pool->num_threads(), 1, [&](int, int) {
      if (path == CpuPath::kAvx512Bf16) return DotLoop();
      if (path == CpuPath::kAvx512) return Fma512Loop();
      Fma256Loop();
    });
  });
  const double lanes = path == CpuPath::kAvx512Bf16 ? 32 : path == CpuPath::kAvx512 ? 16 : 8;
  return 2.0 * lanes * kChains * kLoops * pool->num_threads() / s / 1e9;
}
#else
double PeakGflops(CpuPath, ThreadPool*) { return 0.0; }
#endif

double ReadGbps(ThreadPool* pool) {
  constexpr int kPieces = 512;
  constexpr size_t kPieceWords = 64 << 10;  // of 8 bytes: 256 MiB in all
  AlignedBuffer<uint64_t> memory(kPieces * kPieceWords);
  std::fill_n(memory.data(), memory.size(), 1);
  const double s = Best(0.5, [&] {
    pool->ParallelFor(kPieces, 1, [&](int begin, int) {
      const uint64_t* p = memory.data() + begin * kPieceWords;
      uint64_t sums[32] = {};
      for (size_t i = 0; i < kPieceWords; i += 32) {
        for (int j = 0; j < 32; ++j) sums[j] ^= p[i + j];
      }
      for (const uint64_t x : sums) sink = static_cast<float>(x);
    });
  });
  return kPieces * kPieceWords * 8.0 / s / 1e9;
}

std::vector<Bf16> RandomBf16(size_t size, uint32_t seed) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<Bf16> values(size);
  for (Bf16& value : values) value = ToBf16(uniform(rng));
  return values;
}

struct Shape {
  const char* name;
  int n, k;
  int copies;  // matrices of this shape in a model, so that M = 1 reads memory and not a cache
};
constexpr Shape kShapes[] = {{"qkv", 960, 576, 30},
                             {"o", 576, 576, 30},
                             {"gate_up", 3072, 576, 30},
                             {"down", 576, 1536, 30},
                             {"lm_head", 49152, 576, 1}};

void CheckOnce(const GemmParams& params, const std::vector<Bf16>& w) {
  const int k = params.w->k();
  for (const int col : {0, params.w->n() - 1}) {
    double sum = 0.0;
    for (int i = 0; i < k; ++i) {
      sum += static_cast<double>(ToFloat(params.a_bf16[i])) *
             ToFloat(w[static_cast<size_t>(col) * k + i]);
    }
    if (!(std::abs(sum - params.out[col]) < 1e-3)) {
      std::fprintf(stderr, "wrong result: column %d is %g, not %g\n", col, params.out[col], sum);
      std::exit(1);
    }
  }
}

void RunRows(int m, double peak_gflops, double read_gbps, ThreadPool* pool) {
  double total_s = 0.0, total_flop = 0.0, total_bytes = 0.0;
  const auto print = [&](const char* name, double s, double flop, double bytes) {
    std::printf("%5d  %-8s %10.1f us %8.1f GFLOP/s (%3.0f %%) %7.1f GB/s (%3.0f %%)\n", m, name,
                s * 1e6, flop / s / 1e9, peak_gflops > 0 ? 100 * flop / s / 1e9 / peak_gflops : 0.0,
                bytes / s / 1e9, 100 * bytes / s / 1e9 / read_gbps);
  };
  for (const Shape& shape : kShapes) {
    if (m > 64 && shape.n > 10000) continue;  // logits of a whole prompt are never computed
    const std::vector<Bf16> w = RandomBf16(static_cast<size_t>(shape.n) * shape.k, 1);
    WeightArena arena;
    std::vector<PackedMatrix> packed;
    for (int i = 0; i < shape.copies; ++i) {
      packed.push_back(PackedMatrix::Pack(w.data(), shape.n, shape.k, &arena));
    }
    const std::vector<Bf16> a = RandomBf16(static_cast<size_t>(m) * shape.k, 2);
    std::vector<float> out(static_cast<size_t>(m) * shape.n);
    GemmParams params;
    params.a_bf16 = a.data();
    params.out = out.data();
    params.m = m;
    params.lda = shape.k;
    params.ldo = shape.n;
    const double s = Best(0.3,
                          [&] {
                            for (const PackedMatrix& matrix : packed) {
                              params.w = &matrix;
                              if (!GemmCpu(params, pool).ok()) std::exit(1);
                            }
                          }) /
                     shape.copies;
    CheckOnce(params, w);
    const double flop = 2.0 * m * shape.n * shape.k, bytes = 2.0 * shape.n * shape.k;
    print(shape.name, s, flop, bytes);
    total_s += shape.copies * s;
    total_flop += shape.copies * flop;
    total_bytes += shape.copies * bytes;
  }
  print("model", total_s, total_flop, total_bytes);
}

int Main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  std::vector<int> rows;
  for (int i = 2; i < argc; ++i) rows.push_back(std::max(1, std::atoi(argv[i])));
  if (rows.empty()) rows = {1, 4, 8, 16, 64, 512};
  ThreadPool pool(threads);
  // What dealing an op costs: pieces of 5 us, one a thread, against one alone.
  const auto piece = [](int, int) {
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - start < std::chrono::microseconds(5)) continue;
  };
  const double op_us = 1e3 * Best(0.2,
                                  [&] {
                                    for (int i = 0; i < 1000; ++i)
                                      pool.ParallelFor(threads, 1, piece);
                                  }) -
                       5.0;
  const double peak = PeakGflops(ActiveCpuPath(), &pool);
  const double read = ReadGbps(&pool);
  std::printf("path %s, %d threads: peak %.0f GFLOP/s, read %.1f GB/s, dealing an op %.2f us\n",
              GemmPathName(), threads, peak, read, op_us);
  for (const int m : rows) RunRows(m, peak, read, &pool);
  return 0;
}

}  // namespace
}  // namespace winnow::kernels

int main(int argc, char** argv) { return winnow::kernels::Main(argc, argv); }
