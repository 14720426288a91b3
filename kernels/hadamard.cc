// One product, then butterflies of width 1, 2, 4, ... upwards: the same operations on
// every element whatever the vector's width.
#include "kernels/hadamard.h"

#include <cmath>

#include "kernels/cpu/cpu_path.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/hadamard.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace winnow::kernels {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using VF = hn::Vec<DF>;

// Of lanes that lie kHalf apart: their sum in the lower, their difference in the upper.
template <size_t kHalf>
HWY_INLINE VF Butterfly([[maybe_unused]] DF d, VF x) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (HWY_MAX_BYTES > kHalf * sizeof(float)) {
    const hn::RebindToSigned<DF> di;
    VF other = x;
    if constexpr (kHalf == 1) other = hn::Shuffle2301(x);
    if constexpr (kHalf == 2) other = hn::Shuffle1032(x);
    if constexpr (kHalf == 4) other = hn::SwapAdjacentBlocks(x);
    if constexpr (kHalf == 8) other = hn::SwapAdjacentBlocks(hn::ReverseBlocks(d, x));
    const auto upper = hn::TestBit(hn::Iota(di, 0), hn::Set(di, int{kHalf}));
    return hn::Add(other, hn::IfThenElse(hn::RebindMask(d, upper), hn::Neg(x), x));
  }
#endif
  return x;
}

// `scale` and the butterflies narrower than kVecs vectors.
template <size_t kVecs>
HWY_INLINE void RotateTile(DF d, VF scale, float* x) {
  const size_t lanes = hn::Lanes(d);
  VF v[kVecs];
  for (size_t i = 0; i < kVecs; ++i) {
    const VF y = Butterfly<1>(d, hn::Mul(hn::LoadU(d, x + i * lanes), scale));
    v[i] = Butterfly<8>(d, Butterfly<4>(d, Butterfly<2>(d, y)));
  }
  for (size_t half = 1; half < kVecs; half *= 2) {
    for (size_t i = 0; i < kVecs; ++i) {
      if ((i & half) != 0) continue;
      const VF a = v[i], b = v[i + half];
      v[i] = hn::Add(a, b);
      v[i + half] = hn::Sub(a, b);
    }
  }
  for (size_t i = 0; i < kVecs; ++i) hn::StoreU(v[i], d, x + i * lanes);
}

void Rotate(int head_dim, float* x) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const int n = HadamardBlock(head_dim);
  const VF scale = hn::Set(d, 1.0f / std::sqrt(static_cast<float>(n)));
  const int tile = n >= 4 * lanes ? 4 * lanes : lanes;
  for (int i = 0; i < head_dim; i += tile) {
    if (tile > lanes) {
      RotateTile<4>(d, scale, x + i);
    } else {
      RotateTile<1>(d, scale, x + i);
    }
  }
  for (int half = tile; half < n; half *= 2) {
    for (int i = 0; i < head_dim; i += 2 * half) {
      for (int j = i; j < i + half; j += lanes) {
        const VF a = hn::LoadU(d, x + j), b = hn::LoadU(d, x + j + half);
        hn::StoreU(hn::Add(a, b), d, x + j);
        hn::StoreU(hn::Sub(a, b), d, x + j + half);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow::kernels {

HWY_EXPORT(Rotate);

void HadamardRotate(int head_dim, float* x) {
  ActiveCpuPath();
  HWY_DYNAMIC_DISPATCH(Rotate)(head_dim, x);
}

}  // namespace winnow::kernels
#endif
