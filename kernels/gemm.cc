#include "kernels/gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "kernels/cpu/cpu_path.h"
#include "kernels/gemm_pieces.h"

namespace winnow::kernels {
namespace {

// How a GEMM is cut: pieces of `rows` x `blocks`, those that share weights one
// after the other.
struct GemmPlan {
  int rows = 0, blocks = 0;
  int row_pieces = 0, block_pieces = 0;
};

constexpr int kPieceRows = 48;   // a multiple of every tile's height
constexpr int kPieceBlocks = 4;  // of the widest tile: its weights stay in L2

GemmPlan PlanGemm(const GemmParams& params, int num_threads) {
  GemmPlan plan;
  const int num_blocks = NumBlocks(*params.w);
  plan.rows = std::min(params.m, kPieceRows);
  plan.blocks = kPieceBlocks;
  if (params.m < kPieceRows / 2) {
    // Weights stream from memory once: rounds of one equal piece a thread.
    const int round = kStreamBlocks * num_threads;
    const int pieces = (num_blocks + round - 1) / round * num_threads;
    plan.blocks = (num_blocks + pieces - 1) / pieces;
  }
  plan.row_pieces = (params.m + plan.rows - 1) / plan.rows;
  plan.block_pieces = (num_blocks + plan.blocks - 1) / plan.blocks;
  return plan;
}

}  // namespace

PackedMatrix PackedMatrix::Pack(const Bf16* weights, int n, int k, WeightArena* arena) {
  WINNOW_CHECK(weights != nullptr && n >= 1 && k >= 1);
  PackedMatrix packed;
  packed.n_ = n;
  packed.k_ = k;
  const size_t bytes = packed.bytes();
  void* memory = arena != nullptr ? arena->Allocate(bytes) : std::aligned_alloc(64, bytes);
  WINNOW_CHECK(memory != nullptr);
  packed.data_ = {static_cast<Bf16*>(memory), Free{.in_arena = arena != nullptr}};
  Bf16* out = packed.data_.get();
  const int num_pairs = NumPairs(packed);
  for (int block = 0; block < NumBlocks(packed); ++block) {
    for (int pair = 0; pair < num_pairs; ++pair) {
      for (int lane = 0; lane < kBlockRows; ++lane) {
        const int row = block * kBlockRows + lane;
        const Bf16* in = weights + int64_t{row} * k + 2 * pair;
        *out++ = row < n ? in[0] : Bf16{};
        *out++ = row < n && 2 * pair + 1 < k ? in[1] : Bf16{};
      }
    }
  }
  return packed;
}

size_t PackedMatrix::bytes() const {
  return static_cast<size_t>(NumBlocks(*this) * BlockStride(*this)) * sizeof(Bf16);
}

void PackedMatrix::Row(int row, float* out) const {
  WINNOW_CHECK(row >= 0 && row < n_);
  const Bf16* in = data() + row / kBlockRows * BlockStride(*this) + int64_t{row % kBlockRows} * 2;
  for (int i = 0; i < k_; ++i) out[i] = ToFloat(in[i / 2 * (2 * kBlockRows) + i % 2]);
}

void PackedMatrix::Free::operator()(Bf16* p) const {
  if (!in_arena) std::free(p);
}

absl::Status ValidateGemm(const GemmParams& params) {
  if (params.w == nullptr || params.w->data() == nullptr) {
    return absl::InvalidArgumentError("gemm: w is null or empty");
  }
  if ((params.a_bf16 == nullptr) == (params.a_f32 == nullptr)) {
    return absl::InvalidArgumentError("gemm: exactly one of a_bf16 and a_f32 must be set");
  }
  if (params.out == nullptr) return absl::InvalidArgumentError("gemm: out is null");
  if (params.m < 0) return absl::InvalidArgumentError(absl::StrCat("gemm: m=", params.m, " < 0"));
  if (params.lda < params.w->k()) {
    return absl::InvalidArgumentError(
        absl::StrCat("gemm: lda=", params.lda, " is below k=", params.w->k()));
  }
  if (params.ldo < params.w->n()) {
    return absl::InvalidArgumentError(
        absl::StrCat("gemm: ldo=", params.ldo, " is below n=", params.w->n()));
  }
  return absl::OkStatus();
}

absl::Status GemmCpu(const GemmParams& params, ThreadPool* pool) {
  if (absl::Status status = ValidateGemm(params); !status.ok()) return status;
  if (params.m == 0) return absl::OkStatus();
  const bool dot_bf16 = params.a_bf16 != nullptr && ActiveCpuPath() == CpuPath::kAvx512Bf16;
  const auto run = dot_bf16 ? GemmPieceAvx512Bf16 : GemmPieceHwy;
  const GemmPlan plan = PlanGemm(params, pool->num_threads());
  const int num_blocks = NumBlocks(*params.w);
  pool->ParallelFor(plan.row_pieces * plan.block_pieces, 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      GemmPiece piece;
      piece.row_begin = i % plan.row_pieces * plan.rows;
      piece.row_end = std::min(piece.row_begin + plan.rows, params.m);
      piece.block_begin = i / plan.row_pieces * plan.blocks;
      piece.block_end = std::min(piece.block_begin + plan.blocks, num_blocks);
      run(params, piece);
    }
  });
  return absl::OkStatus();
}

const char* GemmPathName() { return CpuPathName(ActiveCpuPath()); }

}  // namespace winnow::kernels
