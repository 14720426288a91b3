#include "kernels/kv_format.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/bf16.h"
#include "common/base/fp8.h"

namespace winnow::kernels {
namespace {

constexpr uint16_t kHalfNan = 0x7e00;
constexpr uint16_t kHalfMax = 0x7bff;  // 65504

// The smallest positive float16 s with 448 * s >= amax, so |x| / s <= 448. A NaN
// where a value is not finite; 65504 (and saturating codes) past 448 * 65504.
uint16_t ScaleFor(const float* x, int n) {
  int32_t amax_bits = 0;
  for (int i = 0; i < n; ++i) {
    amax_bits = std::max(amax_bits, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
  }
  if (amax_bits >= 0x7f800000) return kHalfNan;
  const float amax = std::bit_cast<float>(amax_bits);
  uint16_t scale = std::min(ToHalf(amax / kE4m3Max), kHalfMax);
  // The product is exact: 11 + 3 bits.
  if (scale == 0 || (scale < kHalfMax && HalfToFloat(scale) * kE4m3Max < amax)) ++scale;
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

void StoreElements(KvFormatId format, int head_dim, const float* x, uint8_t* elements,
                   uint8_t* scale_out) {
  if (format == KvFormatId::kBf16) {
    for (int d = 0; d < head_dim; ++d) {
      const Bf16 b = ToBf16(x[d]);
      std::memcpy(elements + 2 * d, &b, 2);
    }
    return;
  }
  const uint16_t scale = ScaleFor(x, head_dim);
  std::memcpy(scale_out, &scale, 2);
  if (scale == kHalfNan) {
    std::memset(elements, 0, static_cast<size_t>(head_dim));
    return;
  }
  const float s = HalfToFloat(scale);
  int32_t codes[kMaxHeadDim];
  for (int d = 0; d < head_dim; ++d) codes[d] = EncodeE4m3(x[d] / s);
  for (int d = 0; d < head_dim; ++d) elements[d] = static_cast<uint8_t>(codes[d]);
}

void LoadElements(KvFormatId format, int head_dim, const uint8_t* elements, const uint8_t* scale,
                  float* out) {
  if (format == KvFormatId::kBf16) {
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
  for (int d = 0; d < head_dim; ++d) out[d] = DecodeE4m3(elements[d]) * s;
}

}  // namespace

absl::StatusOr<KvFormatId> ParseKvFormat(std::string_view name) {
  if (name == "fp8") return KvFormatId::kFp8;
  if (name == "bf16") return KvFormatId::kBf16;
  return absl::InvalidArgumentError(
      absl::StrCat("kv format \"", std::string(name), "\" is neither \"fp8\" nor \"bf16\""));
}

std::string_view KvFormatName(KvFormatId format) {
  return format == KvFormatId::kFp8 ? "fp8" : "bf16";
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
  const int64_t slots = SlotsPerPage(format, head_dim);
  const int64_t row = static_cast<int64_t>(KvElementBytes(format)) * head_dim;
  const int64_t scale = static_cast<int64_t>(KvScaleBytes(format));
  const uint8_t* scales = page + 2 * slots * row;
  return {.k = page + slot * row,
          .v = page + (slots + slot) * row,
          .k_scale = scales + slot * scale,
          .v_scale = scales + (slots + slot) * scale};
}

TokenRef RowToken(KvFormatId format, int head_dim, const uint8_t* row) {
  const size_t elements = KvElementBytes(format) * static_cast<size_t>(head_dim);
  return {.k = row,
          .v = row + elements,
          .k_scale = row + 2 * elements,
          .v_scale = row + 2 * elements + KvScaleBytes(format)};
}

void StoreRow(KvFormatId format, int head_dim, const float* k, const float* v, uint8_t* row) {
  const size_t elements = KvElementBytes(format) * static_cast<size_t>(head_dim);
  StoreElements(format, head_dim, k, row, row + 2 * elements);
  StoreElements(format, head_dim, v, row + elements, row + 2 * elements + KvScaleBytes(format));
}

namespace {

// Copies a token's four parts between a flat row and a slot, either way.
template <typename Copy>
void ForEachPart(KvFormatId format, int head_dim, const TokenRef& slot, Copy copy) {
  const size_t elements = KvElementBytes(format) * static_cast<size_t>(head_dim);
  const size_t scale = KvScaleBytes(format);
  copy(slot.k, size_t{0}, elements);
  copy(slot.v, elements, elements);
  if (scale == 0) return;
  copy(slot.k_scale, 2 * elements, scale);
  copy(slot.v_scale, 2 * elements + scale, scale);
}

}  // namespace

void CopyRowToPage(KvFormatId format, int head_dim, const uint8_t* row, uint8_t* page, int slot) {
  ForEachPart(format, head_dim, PageToken(format, head_dim, page, slot),
              [&](const uint8_t* at, size_t row_offset, size_t bytes) {
                std::memcpy(page + (at - page), row + row_offset, bytes);
              });
}

void CopyPageToRow(KvFormatId format, int head_dim, const uint8_t* page, int slot, uint8_t* row) {
  ForEachPart(format, head_dim, PageToken(format, head_dim, page, slot),
              [&](const uint8_t* at, size_t row_offset, size_t bytes) {
                std::memcpy(row + row_offset, at, bytes);
              });
}

void LoadK(KvFormatId format, int head_dim, const TokenRef& token, float* out) {
  LoadElements(format, head_dim, token.k, token.k_scale, out);
}

void LoadV(KvFormatId format, int head_dim, const TokenRef& token, float* out) {
  LoadElements(format, head_dim, token.v, token.v_scale, out);
}

}  // namespace winnow::kernels
