#pragma once

#include "kernels/gemm.h"

namespace winnow::kernels {

// A rectangle of a GEMM's output: rows [row_begin, row_end), and of W the blocks
// of 16 rows [block_begin, block_end). Private to kernels/gemm*.cc.
struct GemmPiece {
  int row_begin = 0, row_end = 0;
  int block_begin = 0, block_end = 0;
};

constexpr int kBlockRows = 16;    // rows of W in a packed block
constexpr int kStreamBlocks = 8;  // blocks that a piece of few rows reads side by side

inline int NumBlocks(const PackedMatrix& w) { return (w.n() + kBlockRows - 1) / kBlockRows; }
inline int NumPairs(const PackedMatrix& w) { return (w.k() + 1) / 2; }
// Elements from one packed block to the next.
inline int64_t BlockStride(const PackedMatrix& w) { return int64_t{NumPairs(w)} * 2 * kBlockRows; }

// Float multiply-adds by Highway, on the widest target that is active.
void GemmPieceHwy(const GemmParams& params, const GemmPiece& piece);

// vdpbf16ps on BF16 activations. REQUIRES: ActiveCpuPath() == kAvx512Bf16.
void GemmPieceAvx512Bf16(const GemmParams& params, const GemmPiece& piece);

}  // namespace winnow::kernels
