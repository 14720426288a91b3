// GEMM pieces in float multiply-adds, for every Highway target. A BF16 weight
// becomes a float by a shift (even k) or a mask (odd k) of its pair. Each output
// is one lane of one accumulator: acc = fma(w[2p], a[2p], acc), then the same for
// 2p + 1, p ascending, in every tile shape and vector width.
#include <algorithm>
#include <cstdint>

#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/cpu_path.h"
#include "kernels/gemm_pieces.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm_hwy.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/vec_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow::kernels {
namespace HWY_NAMESPACE {
namespace {

using FloatTag = hn::CappedTag<float, kBlockRows>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(FloatTag()));
constexpr int kBlockVecs = kBlockRows / kLanes;  // vectors of one block's 16 rows
// Tile shapes that fill the registers: 24 accumulators of 32, or 12 of 16.
constexpr int kTileRows = kLanes >= 8 ? 6 : 3;
constexpr int kTileBlocks = kLanes >= 16 ? 4 : 1;

struct TileArgs {
  const float* a;  // [rows, k], row stride lda
  int64_t lda;
  const Bf16* w;         // first block
  int64_t block_stride;  // elements
  int k;
  float* out;  // [rows, n], row stride ldo
  int64_t ldo;
  int n_left;  // columns of `out` from the first block's on
  bool accumulate;
};

template <int kRows, int kBlocks>
void Tile(const TileArgs& t) {
  constexpr int kVecs = kBlocks * kBlockVecs;
  const FloatTag d;
  const hn::RebindToUnsigned<FloatTag> du;
  using V = hn::Vec<FloatTag>;
  const auto odd_mask = hn::Set(du, 0xffff0000u);
  V acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) acc[r][v] = hn::Zero(d);
  }
  const uint32_t* w = reinterpret_cast<const uint32_t*>(t.w);
  const int64_t block_stride = t.block_stride / 2;
  const int num_full = t.k / 2;
  for (int pair = 0; pair <= num_full; ++pair, w += kBlockRows) {
    const bool has_odd = pair < num_full;
    if (!has_odd && t.k % 2 == 0) break;
    V weights[kVecs];
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      const auto bits = hn::LoadU(du, w + v / kBlockVecs * block_stride + v % kBlockVecs * kLanes);
      weights[v] = hn::BitCast(d, hn::ShiftLeft<16>(bits));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V a = hn::Set(d, t.a[r * t.lda + 2 * pair]);
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) acc[r][v] = hn::MulAdd(weights[v], a, acc[r][v]);
    }
    if (!has_odd) break;
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      const auto bits = hn::LoadU(du, w + v / kBlockVecs * block_stride + v % kBlockVecs * kLanes);
      weights[v] = hn::BitCast(d, hn::And(bits, odd_mask));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V a = hn::Set(d, t.a[r * t.lda + 2 * pair + 1]);
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) acc[r][v] = hn::MulAdd(weights[v], a, acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVecs; ++v) {
    const int columns = t.n_left - v * kLanes;
    if (columns <= 0) break;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float* out = t.out + r * t.ldo + v * kLanes;
      if (columns >= kLanes) {
        const V sum = t.accumulate ? hn::Add(hn::LoadU(d, out), acc[r][v]) : acc[r][v];
        hn::StoreU(sum, d, out);
        continue;
      }
      float lanes[kLanes];
      hn::StoreU(acc[r][v], d, lanes);
      for (int i = 0; i < columns; ++i) out[i] = t.accumulate ? out[i] + lanes[i] : lanes[i];
    }
  }
}

using TileFn = void (*)(const TileArgs&);

template <int kBlocks>
TileFn ChooseTile(int rows) {
  switch (rows) {
    case 1:
      return Tile<1, kBlocks>;
    case 2:
      return Tile<2, kBlocks>;
    case 3:
      return Tile<3, kBlocks>;
    case 4:
      return Tile<std::min(4, kTileRows), kBlocks>;
    case 5:
      return Tile<std::min(5, kTileRows), kBlocks>;
    default:
      return Tile<kTileRows, kBlocks>;
  }
}

}  // namespace

// `a` is the piece's first row.
void GemmRunPiece(const GemmParams& params, const GemmPiece& piece, const float* a, int64_t lda) {
  const PackedMatrix& w = *params.w;
  TileArgs t{};
  t.lda = lda;
  t.block_stride = BlockStride(w);
  t.k = w.k();
  t.ldo = params.ldo;
  t.accumulate = params.accumulate;
  for (int block = piece.block_begin; block < piece.block_end;) {
    const int blocks = piece.block_end - block >= kTileBlocks ? kTileBlocks : 1;
    t.w = w.data() + block * t.block_stride;
    t.n_left = w.n() - block * kBlockRows;
    for (int row = piece.row_begin; row < piece.row_end; row += kTileRows) {
      const int rows = std::min(piece.row_end - row, kTileRows);
      t.a = a + (row - piece.row_begin) * lda;
      t.out = params.out + row * params.ldo + int64_t{block} * kBlockRows;
      (blocks == 1 ? ChooseTile<1>(rows) : ChooseTile<kTileBlocks>(rows))(t);
    }
    block += blocks;
  }
}

void GemmConvertRows(const GemmParams& params, const GemmPiece& piece, float* out) {
  const FloatTag d;
  const int k = params.w->k();
  for (int row = piece.row_begin; row < piece.row_end; ++row, out += k) {
    const Bf16* in = params.a_bf16 + row * params.lda;
    int i = 0;
    for (; i + kLanes <= k; i += kLanes) hn::StoreU(LoadBf16(d, in + i), d, out + i);
    for (; i < k; ++i) out[i] = ToFloat(in[i]);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow::kernels {

HWY_EXPORT(GemmRunPiece);
HWY_EXPORT(GemmConvertRows);

void GemmPieceHwy(const GemmParams& params, const GemmPiece& piece) {
  ActiveCpuPath();  // caps the dispatch below
  if (params.a_f32 != nullptr) {
    const float* a = params.a_f32 + piece.row_begin * params.lda;
    HWY_DYNAMIC_DISPATCH(GemmRunPiece)(params, piece, a, params.lda);
    return;
  }
  thread_local AlignedBuffer<float> scratch;  // grows to the largest piece, then stays
  const int k = params.w->k();
  scratch.Reserve(static_cast<size_t>(piece.row_end - piece.row_begin) * k);
  HWY_DYNAMIC_DISPATCH(GemmConvertRows)(params, piece, scratch.data());
  HWY_DYNAMIC_DISPATCH(GemmRunPiece)(params, piece, scratch.data(), k);
}

}  // namespace winnow::kernels
#endif
