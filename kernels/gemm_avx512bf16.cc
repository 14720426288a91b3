// BF16 x BF16 tiles on vdpbf16ps. Each output is one lane of one accumulator
// that takes the pairs of k in ascending order, in every tile shape, so the
// shape that a row happens to meet changes no bit.
//
// The target attribute stands on each function, not on the file: code shared
// with other files must stay runnable on hosts without AVX-512.
#include "kernels/gemm_pieces.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define WINNOW_TARGET_AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace winnow::kernels {
namespace {

struct TileArgs {
  const Bf16* a;  // [rows, k], row stride lda
  int64_t lda;
  const Bf16* w;         // first block
  int64_t block_stride;  // elements
  int k;
  float* out;  // [rows, n], row stride ldo
  int64_t ldo;
  int n_left;  // columns of `out` from the first block's on
  bool accumulate;
};

// Two BF16 of one row of A in every lane.
WINNOW_TARGET_AVX512BF16 inline __m512bh BroadcastPair(const Bf16* a) {
  int32_t pair;
  std::memcpy(&pair, a, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}

WINNOW_TARGET_AVX512BF16 inline __m512bh LoadWeights(const Bf16* w) {
  return (__m512bh)_mm512_load_si512(w);
}

// kRows x kBlocks accumulators: at most 24 of the 32 registers, the rest holds
// kBlocks vectors of weights and one broadcast.
template <int kRows, int kBlocks>
WINNOW_TARGET_AVX512BF16 void Tile(const TileArgs& t) {
  __m512 acc[kRows][kBlocks];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) acc[r][b] = _mm512_setzero_ps();
  }
  const Bf16* w = t.w;
  const int num_full = t.k / 2;
  for (int pair = 0; pair < num_full; ++pair, w += 2 * kBlockRows) {
    __m512bh weights[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) weights[b] = LoadWeights(w + b * t.block_stride);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh a = BroadcastPair(t.a + r * t.lda + 2 * pair);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], a, weights[b]);
    }
  }
  if (t.k % 2 != 0) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Bf16 last[2] = {t.a[r * t.lda + t.k - 1], Bf16{}};
      const __m512bh a = BroadcastPair(last);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        acc[r][b] = _mm512_dpbf16_ps(acc[r][b], a, LoadWeights(w + b * t.block_stride));
      }
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
    const int columns = std::min(t.n_left - b * kBlockRows, kBlockRows);
    const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* out = t.out + r * t.ldo + b * kBlockRows;
      __m512 sum = acc[r][b];
      if (t.accumulate) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sum);
      _mm512_mask_storeu_ps(out, mask, sum);
    }
  }
}

using TileFn = void (*)(const TileArgs&);

// A piece's rows go in tiles of kTileRows, the rest in one lower tile. Up to two
// rows only read weights: as many blocks side by side as the piece has, because
// one core reads memory at 15 GB/s in one stream and at 26 in eight (Zen 4).
constexpr int kTileRows = 6;
constexpr int kTileBlocks = 4;
constexpr int kStreamRows = 2;

template <int kRows>
TileFn StreamTile(int blocks) {
  constexpr TileFn kTiles[kStreamBlocks] = {Tile<kRows, 1>, Tile<kRows, 2>, Tile<kRows, 3>,
                                            Tile<kRows, 4>, Tile<kRows, 5>, Tile<kRows, 6>,
                                            Tile<kRows, 7>, Tile<kRows, 8>};
  return kTiles[blocks - 1];
}

TileFn ChooseTile(int rows, int blocks) {
  constexpr TileFn kWide[kTileRows] = {Tile<1, 4>, Tile<2, 4>, Tile<3, 4>,
                                       Tile<4, 4>, Tile<5, 4>, Tile<6, 4>};
  constexpr TileFn kNarrow[kTileRows] = {Tile<1, 1>, Tile<2, 1>, Tile<3, 1>,
                                         Tile<4, 1>, Tile<5, 1>, Tile<6, 1>};
  return (blocks == kTileBlocks ? kWide : kNarrow)[rows - 1];
}

}  // namespace

void GemmPieceAvx512Bf16(const GemmParams& params, const GemmPiece& piece) {
  const PackedMatrix& w = *params.w;
  TileArgs t{};
  t.lda = params.lda;
  t.block_stride = BlockStride(w);
  t.k = w.k();
  t.ldo = params.ldo;
  t.accumulate = params.accumulate;
  const int num_rows = piece.row_end - piece.row_begin;
  for (int block = piece.block_begin; block < piece.block_end;) {
    const int left = piece.block_end - block;
    const bool stream = num_rows <= kStreamRows;
    const int blocks = stream                ? std::min(left, kStreamBlocks)
                       : left >= kTileBlocks ? kTileBlocks
                                             : 1;
    t.w = w.data() + block * t.block_stride;
    t.n_left = w.n() - block * kBlockRows;
    for (int row = piece.row_begin; row < piece.row_end; row += kTileRows) {
      const int rows = std::min(piece.row_end - row, kTileRows);
      t.a = params.a_bf16 + row * params.lda;
      t.out = params.out + row * params.ldo + int64_t{block} * kBlockRows;
      const TileFn tile = !stream     ? ChooseTile(rows, blocks)
                          : rows == 1 ? StreamTile<1>(blocks)
                                      : StreamTile<2>(blocks);
      tile(t);
    }
    block += blocks;
  }
}

}  // namespace winnow::kernels

#else

#include "common/base/check.h"

namespace winnow::kernels {

void GemmPieceAvx512Bf16(const GemmParams&, const GemmPiece&) { WINNOW_CHECK(false); }

}  // namespace winnow::kernels

#endif
