#include "kernels/kv_format.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/bf16.h"
#include "common/base/fp8.h"

namespace winnow::kernels {
namespace {

constexpr uint16_t kHalfNan = 0x7e00;
constexpr uint16_t kHalfMax = 0x7bff;  // 65504

// The smallest positive float16 s with max_code * s >= amax, so |x| / s <= max_code.
// A NaN where a value is not finite; 65504 (and saturating codes) past max_code * 65504.
uint16_t ScaleFor(const float* x, int n, float max_code) {
  int32_t amax_bits = 0;
  for (int i = 0; i < n; ++i) {
    amax_bits = std::max(amax_bits, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
  }
  if (amax_bits >= 0x7f800000) return kHalfNan;
  const float amax = std::bit_cast<float>(amax_bits);
  uint16_t scale = std::min(ToHalf(amax / max_code), kHalfMax);
  // The product is exact: 11 bits and 3 or 7.
  if (scale == 0 || (scale < kHalfMax && HalfToFloat(scale) * max_code < amax)) ++scale;
  return scale;
}

// ToE4m3() for a finite value, without branches and in 32-bit steps that the
// compiler turns into vectors.
int32_t EncodeE4m3(float x) {
  const int32_t u = std::bit_cast<int32_t>(x);
  const int32_t sign = (u >> 24) & 0x80;
  const int32_t abs = std::min(u & 0x7fffffff, std::bit_cast<int32_t>(kE4m3Max));
  // From 2^-6 up: drop 20 mantissa bits, ties to even, and move the exponent's bias from 127 to 7.
  const int32_t normal = ((abs + 0x7ffff + ((abs >> 20) & 1)) >> 20) - (120 << 3);
  // Below: the spacing is 2^-9, which is that of floats at 2^14.
  const int32_t small = std::bit_cast<int32_t>(std::bit_cast<float>(abs) + 16384.0f) & 0xff;
  const int32_t is_small = (abs - 0x3c800000) >> 31;  // all ones below 2^-6
  return sign | (small & is_small) | (normal & ~is_small);
}

// |x| rounded to e4m3 as EncodeE4m3() does, as a float.
float RoundToE4m3(float x) {
  const int32_t abs =
      std::min(std::bit_cast<int32_t>(x) & 0x7fffffff, std::bit_cast<int32_t>(kE4m3Max));
  const int32_t normal = (abs + 0x7ffff + ((abs >> 20) & 1)) & ~0xfffff;
  const int32_t small = std::bit_cast<int32_t>(std::bit_cast<float>(abs) + 16384.0f - 16384.0f);
  const int32_t is_small = (abs - 0x3c800000) >> 31;
  return std::bit_cast<float>((small & is_small) | (normal & ~is_small));
}

// Squared error of e4m3 codes with scale `half`. Sixteen sums, then those in order.
float E4m3Error(const float* x, int n, uint16_t half) {
  const float scale = HalfToFloat(half), inverse = 1.0f / scale;
  float sums[16] = {};
  for (int i = 0; i < n; i += 16) {
    for (int j = 0; j < 16; ++j) {
      const float y = x[i + j] * inverse;
      const float error = std::fabs(y) - RoundToE4m3(y);
      sums[j] += error * error;
    }
  }
  float sum = 0.0f;
  for (const float part : sums) sum += part;
  return sum * scale * scale;
}

uint16_t E4m3ScaleFor(const float* x, int n) {
  const uint16_t smallest = ScaleFor(x, n, kE4m3Max);
  if (smallest == kHalfNan) return smallest;
  const uint16_t other =
      std::min(ToHalf(HalfToFloat(smallest) * std::numbers::sqrt2_v<float>), kHalfMax);
  return E4m3Error(x, n, other) < E4m3Error(x, n, smallest) ? other : smallest;
}

// The nearest integer, ties to even, saturating at +-127; for a finite value.
int32_t EncodeInt8(float x) {
  // Floats from 2^23 to 2^24 are the integers there, rounded to by the addition.
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return std::bit_cast<int32_t>(std::min(std::max(x, -127.0f), 127.0f) + kShift) -
         std::bit_cast<int32_t>(kShift);
}

template <KvElement kElement>
void StoreElements(int head_dim, const float* x, uint8_t* elements, uint8_t* scale_out) {
  if constexpr (kElement == KvElement::kBf16) {
    for (int d = 0; d < head_dim; ++d) {
      const Bf16 b = ToBf16(x[d]);
      std::memcpy(elements + 2 * d, &b, 2);
    }
  } else {
    const uint16_t scale = kElement == KvElement::kE4m3
                               ? E4m3ScaleFor(x, head_dim)
                               : ScaleFor(x, head_dim, KvElementTraits<kElement>::kMaxCode);
    std::memcpy(scale_out, &scale, 2);
    if (scale == kHalfNan) {
      std::memset(elements, 0, static_cast<size_t>(head_dim));
      return;
    }
    const float s = HalfToFloat(scale);
    int32_t codes[kMaxHeadDim];
    for (int d = 0; d < head_dim; ++d) {
      codes[d] = kElement == KvElement::kInt8 ? EncodeInt8(x[d] / s) : EncodeE4m3(x[d] / s);
    }
    for (int d = 0; d < head_dim; ++d) elements[d] = static_cast<uint8_t>(codes[d]);
  }
}

void StoreElements(KvElement element, int head_dim, const float* x, uint8_t* elements,
                   uint8_t* scale) {
  switch (element) {
    case KvElement::kBf16:
      return StoreElements<KvElement::kBf16>(head_dim, x, elements, scale);
    case KvElement::kE4m3:
      return StoreElements<KvElement::kE4m3>(head_dim, x, elements, scale);
    case KvElement::kInt8:
      return StoreElements<KvElement::kInt8>(head_dim, x, elements, scale);
  }
}

void LoadElements(KvElement element, int head_dim, const uint8_t* elements, const uint8_t* scale,
                  float* out) {
  if (element == KvElement::kBf16) {
    for (int d = 0; d < head_dim; ++d) {
      Bf16 b;
      std::memcpy(&b, elements + 2 * d, 2);
      out[d] = ToFloat(b);
    }
    return;
  }
  uint16_t half;
  std::memcpy(&half, scale, 2);
  const float s = HalfToFloat(half);
  for (int d = 0; d < head_dim; ++d) {
    out[d] = s * (element == KvElement::kInt8 ? static_cast<float>(static_cast<int8_t>(elements[d]))
                                              : DecodeE4m3(elements[d]));
  }
}

// Bytes of a token's four parts.
struct PartBytes {
  size_t k, v, k_scale, v_scale;
};

PartBytes PartsOf(KvFormatId format, int head_dim) {
  const KvFormat& f = KvFormatOf(format);
  const size_t dim = static_cast<size_t>(head_dim);
  return {.k = KvElementBytes(f.k) * dim,
          .v = KvElementBytes(f.v) * dim,
          .k_scale = KvScaleBytes(f.k),
          .v_scale = KvScaleBytes(f.v)};
}

// The token in slot `slot` of `slots` that start at `base`.
TokenRef TokenAt(const PartBytes& bytes, const uint8_t* base, size_t slots, size_t slot) {
  const uint8_t* v = base + slots * bytes.k;
  const uint8_t* k_scale = v + slots * bytes.v;
  const uint8_t* v_scale = k_scale + slots * bytes.k_scale;
  return {.k = base + slot * bytes.k,
          .v = v + slot * bytes.v,
          .k_scale = k_scale + slot * bytes.k_scale,
          .v_scale = v_scale + slot * bytes.v_scale};
}

}  // namespace

absl::StatusOr<KvFormatId> ParseKvFormat(std::string_view name) {
  std::string names;
  for (const KvFormat& format : kKvFormats) {
    if (format.name == name) return format.id;
    absl::StrAppend(&names, std::string(format.name), ", ");
  }
  if (name == "best") return kBestKvFormat;
  return absl::InvalidArgumentError(
      absl::StrCat("kv format \"", std::string(name), "\" is none of ", names, "best"));
}

absl::Status ValidateHeadDim(int head_dim) {
  if (head_dim < 16 || head_dim > kMaxHeadDim || head_dim % 16 != 0) {
    return absl::UnimplementedError(
        absl::StrCat("head_dim=", head_dim, " is not a multiple of 16 in [16, ", kMaxHeadDim, "]"));
  }
  return absl::OkStatus();
}

float DecodeE4m3(uint8_t code) {
  // As a float16 the same sign, exponent and mantissa bits are worth 2^-8 of it.
  const uint16_t half = static_cast<uint16_t>(((code & 0x80u) << 8) | ((code & 0x7fu) << 7));
  return HalfToFloat(half) * 256.0f;
}

TokenRef PageToken(KvFormatId format, int head_dim, const uint8_t* page, int slot) {
  return TokenAt(PartsOf(format, head_dim), page,
                 static_cast<size_t>(SlotsPerPage(format, head_dim)), static_cast<size_t>(slot));
}

TokenRef RowToken(KvFormatId format, int head_dim, const uint8_t* row) {
  return TokenAt(PartsOf(format, head_dim), row, 1, 0);
}

void StoreRow(KvFormatId format, int head_dim, const float* k, const float* v, uint8_t* row) {
  const KvFormat& f = KvFormatOf(format);
  const TokenRef at = RowToken(format, head_dim, row);
  const auto mutable_at = [row](const uint8_t* p) { return row + (p - row); };
  StoreElements(f.k, head_dim, k, mutable_at(at.k), mutable_at(at.k_scale));
  StoreElements(f.v, head_dim, v, mutable_at(at.v), mutable_at(at.v_scale));
}

namespace {

// Copies a token's four parts; `to` lies in the memory that starts at `base`.
void CopyToken(const PartBytes& bytes, const TokenRef& from, const TokenRef& to, uint8_t* base) {
  std::memcpy(base + (to.k - base), from.k, bytes.k);
  std::memcpy(base + (to.v - base), from.v, bytes.v);
  std::memcpy(base + (to.k_scale - base), from.k_scale, bytes.k_scale);
  std::memcpy(base + (to.v_scale - base), from.v_scale, bytes.v_scale);
}

}  // namespace

void CopyRowToPage(KvFormatId format, int head_dim, const uint8_t* row, uint8_t* page, int slot) {
  CopyToken(PartsOf(format, head_dim), RowToken(format, head_dim, row),
            PageToken(format, head_dim, page, slot), page);
}

void CopyPageToRow(KvFormatId format, int head_dim, const uint8_t* page, int slot, uint8_t* row) {
  CopyToken(PartsOf(format, head_dim), PageToken(format, head_dim, page, slot),
            RowToken(format, head_dim, row), row);
}

void LoadK(KvFormatId format, int head_dim, const TokenRef& token, float* out) {
  LoadElements(KvFormatOf(format).k, head_dim, token.k, token.k_scale, out);
}

void LoadV(KvFormatId format, int head_dim, const TokenRef& token, float* out) {
  LoadElements(KvFormatOf(format).v, head_dim, token.v, token.v_scale, out);
}

}  // namespace winnow::kernels
