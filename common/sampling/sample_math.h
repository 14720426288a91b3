#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/sampling/philox.h"

// The arithmetic of sampling, shared by CPU and GPU. A token's weight, exp((logit - max) /
// temperature), is rounded to an integer by operations that round alike everywhere, and what
// follows adds and compares integers: sums have no order, so every backend chooses the same token.
namespace winnow {

#if defined(__CUDACC__)
#define WINNOW_HOST_DEVICE __host__ __device__
#else
#define WINNOW_HOST_DEVICE
#endif

inline constexpr int kSampleWeightBits = 43;      // the largest logit weighs 2^43
inline constexpr int kMaxSampleVocab = 1 << 20;   // so that sums are at most 2^63
inline constexpr double kSampleCutoff = 16 * 45;  // weights at -t / 16 octaves are 0
inline constexpr int kNumSamplePowers = 16;
// 2^(j / 16).
constexpr double SamplePower(int j) {
  constexpr double kPowers[kNumSamplePowers] = {1.0,
                                                0x1.0b5586cf9890fp+0,
                                                0x1.172b83c7d517bp+0,
                                                0x1.2387a6e756238p+0,
                                                0x1.306fe0a31b715p+0,
                                                0x1.3dea64c123422p+0,
                                                0x1.4bfdad5362a27p+0,
                                                0x1.5ab07dd485429p+0,
                                                0x1.6a09e667f3bcdp+0,
                                                0x1.7a11473eb0187p+0,
                                                0x1.8ace5422aa0dbp+0,
                                                0x1.9c49182a3f090p+0,
                                                0x1.ae89f995ad3adp+0,
                                                0x1.c199bdd85529cp+0,
                                                0x1.d5818dcfba487p+0,
                                                0x1.ea4afa2a490dap+0};
  return kPowers[j];
}

namespace sample_internal {

inline constexpr double kCoefficients[] = {0x1.5d87fe78a6731p-30, 0x1.3b2ab6fba4e77p-23,
                                           0x1.c6b08d704a0c0p-17, 0x1.ebfbdff82c58fp-11,
                                           0x1.62e42fefa39efp-5};
#if defined(__CUDACC__)
// Operands from there; literals take two instructions a use.
static __constant__ double kDeviceCoefficients[] = {
    kCoefficients[0], kCoefficients[1], kCoefficients[2], kCoefficients[3], kCoefficients[4]};
#endif

WINNOW_HOST_DEVICE inline double Coefficient(int i) {
#if defined(__CUDA_ARCH__)
  return kDeviceCoefficients[i];
#else
  return kCoefficients[i];
#endif
}

// Never fused, whatever the compiler thinks.
WINNOW_HOST_DEVICE inline double Mul(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
WINNOW_HOST_DEVICE inline double Add(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
WINNOW_HOST_DEVICE inline uint64_t Bits(double x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  return std::bit_cast<uint64_t>(x);
#endif
}
WINNOW_HOST_DEVICE inline double FromBits(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<int64_t>(x));
#else
  return std::bit_cast<double>(x);
#endif
}

}  // namespace sample_internal

// What a difference of logits is multiplied by: to sixteenths of an octave. temperature > 0.
WINNOW_HOST_DEVICE inline double SampleScale(float temperature) {
  return 0x1.71547652b82fep+4 / static_cast<double>(temperature);  // 16 / ln 2
}

// round(2^43 exp((logit - max_logit) / temperature)), relative error below 2^-42; 0 for -inf.
// REQUIRES: logit <= max_logit, which is finite. powers[j] is SamplePower(j).
WINNOW_HOST_DEVICE inline uint64_t SampleWeight(float logit, float max_logit, double scale,
                                                const double* powers) {
  using namespace sample_internal;
  // No branch, so that a GPU's thread works at several at once.
  const double exact = Mul(static_cast<double>(logit) - static_cast<double>(max_logit), scale);
  const bool counts = exact > -kSampleCutoff;
  const double t = counts ? exact : -kSampleCutoff;
  // t = 16 octave + j + f, |f| <= 1/2: adding 1.5 * 2^52 leaves the integer in the low bits.
  const double shifted = Add(t, 0x1.8p52);
  const int32_t n = static_cast<int32_t>(Bits(shifted));
  const double f = Add(t, -Add(shifted, -0x1.8p52));
  // 2^(f / 16): Taylor's series to the fifth power, whose next term is below 2^-42.
  double p = Coefficient(0);
  p = Add(Mul(p, f), Coefficient(1));
  p = Add(Mul(p, f), Coefficient(2));
  p = Add(Mul(p, f), Coefficient(3));
  p = Add(Mul(p, f), Coefficient(4));
  p = Add(Mul(p, f), 1.0);
  p = Mul(p, powers[n & 15]);
  const int64_t exponent = (n >> 4) + kSampleWeightBits;
  const double weight = FromBits(Bits(p) + (static_cast<uint64_t>(exponent) << 52));
  return Bits(Add(weight, 0x1p52)) & ((uint64_t{1} << 52) - 1);  // at the cutoff 0
}

// 53 random bits of a key, on top of eleven zeros.
constexpr uint64_t SampleBits(uint64_t seed, uint64_t position, uint32_t sample_index) {
  const auto words = Philox4x32(
      {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), sample_index, 0},
      {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return (uint64_t{words[0]} << 32 | words[1]) >> 11 << 11;
}

// The least sum of weights that makes top_p < 1 of `total` >= 1; in [1, total].
WINNOW_HOST_DEVICE inline uint64_t SampleEnough(float top_p, uint64_t total) {
  const double enough =
      sample_internal::Mul(static_cast<double>(top_p), static_cast<double>(total));
  return static_cast<uint64_t>(ceil(enough));
}

// Where in [0, total) the draw falls: the token is the first by rank whose weight, added to those
// before it, exceeds this.
WINNOW_HOST_DEVICE inline uint64_t SampleTarget(uint64_t bits, uint64_t total) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(bits, total);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * total) >> 64);
#endif
}

}  // namespace winnow
