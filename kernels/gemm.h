#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "common/base/bf16.h"
#include "common/base/thread_pool.h"
#include "kernels/cpu/weight_arena.h"

namespace winnow::kernels {

// A weight matrix W [n, k] in the one layout that every CPU GEMM path reads:
// blocks of 16 rows, inside a block pairs of k, inside a pair the 16 rows:
//   data[n / 16][k / 2][n % 16][k % 2]
// Rows past n and the odd k's partner are zero. 64-byte aligned. Immutable
// after packing, so any thread may read it.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  // `weights` is row-major [n, k] with n, k >= 1; it is not kept. With an arena the
  // memory is the arena's, which must outlive the matrix.
  static PackedMatrix Pack(const Bf16* weights, int n, int k, WeightArena* arena = nullptr);

  int n() const { return n_; }
  int k() const { return k_; }
  const Bf16* data() const { return data_.get(); }
  size_t bytes() const;

  // Writes row `row`, in [0, n), to out [k]: an embedding table that is also
  // the output projection is stored once.
  void Row(int row, float* out) const;

 private:
  struct Free {
    bool in_arena;  // the arena's: nothing to do
    void operator()(Bf16* p) const;
  };
  int n_ = 0, k_ = 0;
  std::unique_ptr<Bf16[], Free> data_;
};

// out[m, n] (+)= sum_k a[m, k] * w[n, k].
//
// Law of order: each output is one float accumulator; k runs upwards in pairs,
// each pair added by one fixed sequence of operations. So a row of `out` has the
// same bits whatever m, its place in the batch and the number of threads. (Bits
// differ between a host with AVX-512 BF16 and one without: the instruction's
// rounding is its own. GemmPathName() says which path runs.)
struct GemmParams {
  // Exactly one of a_bf16 and a_f32 is set: activations already rounded to
  // BF16, or float ones that are multiplied unrounded (evaluation).
  const Bf16* a_bf16 = nullptr;  // [m, k], row stride lda
  const float* a_f32 = nullptr;  // [m, k], row stride lda
  const PackedMatrix* w = nullptr;
  float* out = nullptr;      // [m, n], row stride ldo; must not alias a
  int m = 0;                 // >= 0; 0 does nothing
  int64_t lda = 0, ldo = 0;  // elements
  bool accumulate = false;   // add to what `out` holds (residual): out + sum, one addition
};

// INVALID_ARGUMENT for a null pointer or a bad shape.
absl::Status ValidateGemm(const GemmParams& params);
absl::Status GemmCpu(const GemmParams& params, ThreadPool* pool);

// What runs BF16 activations here: "avx512bf16", "avx512", "avx2" or "scalar".
// Float ones never take "avx512bf16", but the path below it.
const char* GemmPathName();

}  // namespace winnow::kernels
