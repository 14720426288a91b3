#pragma once

namespace winnow::kernels {

// Width of the blocks of HadamardRotate(): the largest power of two in head_dim.
constexpr int HadamardBlock(int head_dim) { return head_dim & -head_dim; }

// Multiplies x [head_dim] in place by a block-diagonal matrix whose n x n blocks, n =
// HadamardBlock(head_dim), are H[i][j] = (-1)^popcount(i & j) / sqrt(n). It is
// orthogonal and its own inverse, so products of two rotated vectors are what they
// were; it spreads an outlying channel over its block. Bits depend on x alone.
void HadamardRotate(int head_dim, float* x);

}  // namespace winnow::kernels
