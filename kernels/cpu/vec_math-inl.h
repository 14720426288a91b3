// Vector helpers that the CPU ops share. A Highway "-inl" header: included once
// for each target, after hwy/highway.h, by files that use foreach_target.h.
//
// Law of order: every function is element-wise or fixes its own order, with the
// same operations for every vector width, so a value's bits do not depend on the
// lane that it sits in nor on how many neighbours it has.
#if defined(WINNOW_KERNELS_CPU_VEC_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINNOW_KERNELS_CPU_VEC_MATH_INL_H_
#undef WINNOW_KERNELS_CPU_VEC_MATH_INL_H_
#else
#define WINNOW_KERNELS_CPU_VEC_MATH_INL_H_
#endif

#include <cstdint>

#include "common/base/bf16.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace winnow::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// exp(x), relative error below 2e-7. Exactly 0 below -87 (so also at -inf),
// +inf above 88.72, NaN stays NaN.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
  const hn::RebindToSigned<D> di;
  // x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts, n times the first exact.
  const V clamped = hn::Min(hn::Max(x, hn::Set(d, -87.0f)), hn::Set(d, 88.72f));
  const V n = hn::Round(hn::Mul(clamped, hn::Set(d, 1.44269504088896341f)));
  V r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), clamped);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
  // Cephes' polynomial: exp(r) = 1 + r + r^2 q(r).
  V q = hn::Set(d, 1.9875691500e-4f);
  q = hn::MulAdd(q, r, hn::Set(d, 1.3981999507e-3f));
  q = hn::MulAdd(q, r, hn::Set(d, 8.3334519073e-3f));
  q = hn::MulAdd(q, r, hn::Set(d, 4.1665795894e-2f));
  q = hn::MulAdd(q, r, hn::Set(d, 1.6666665459e-1f));
  q = hn::MulAdd(q, r, hn::Set(d, 5.0000001201e-1f));
  const V y = hn::Add(hn::MulAdd(q, hn::Mul(r, r), r), hn::Set(d, 1.0f));
  // The clamp keeps y * 2^n normal, so n can be added to the exponent.
  const auto exponent = hn::ShiftLeft<23>(hn::ConvertTo(di, n));
  V result = hn::BitCast(d, hn::Add(hn::BitCast(di, y), exponent));
  result = hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.0f)), result);
  result = hn::IfThenElse(hn::Gt(x, hn::Set(d, 88.72f)), hn::Inf(d), result);
  return hn::IfThenElse(hn::Eq(x, x), result, x);
}

// silu(x) = x / (1 + exp(-x)).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Silu(D d, V x) {
  return hn::Div(x, hn::Add(hn::Set(d, 1.0f), Exp(d, hn::Neg(x))));
}

// Lanes(d) values of BF16 as float.
template <class D>
HWY_INLINE hn::Vec<D> LoadBf16(D d, const Bf16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<uint32_t, D> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

// Rounds as ToBf16() does (nearest, ties to even; NaN stays NaN) and stores
// Lanes(d) values.
template <class D>
HWY_INLINE void StoreBf16(D /*d*/, hn::Vec<D> v, Bf16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<int32_t, D> di;
  const hn::Rebind<uint32_t, D> d32;
  const auto u = hn::BitCast(d32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(d32, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(u, hn::Add(odd, hn::Set(d32, 0x7fff))));
  const auto nan = hn::Or(hn::ShiftRight<16>(u), hn::Set(d32, 0x40));
  const auto bits = hn::IfThenElse(hn::RebindMask(d32, hn::Eq(v, v)), rounded, nan);
  // At most 0xffff, so the signed saturation of DemoteTo changes nothing.
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, bits)), d16, reinterpret_cast<uint16_t*>(p));
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow::kernels
HWY_AFTER_NAMESPACE();

#endif  // include guard, once a target
