#include <cuda_runtime.h>

#include <algorithm>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/compact_decode_attention.cuh"
#include "kernels/cuda/compact_decode_attention.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"

namespace winnow::kernels {
namespace device {

extern template absl::Status LaunchCompactDecode<KvElement::kBf16, KvElement::kBf16, 64>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);
extern template absl::Status LaunchCompactDecode<KvElement::kBf16, KvElement::kBf16, 128>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);
extern template absl::Status LaunchCompactDecode<KvElement::kE4m3, KvElement::kE4m3, 64>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);
extern template absl::Status LaunchCompactDecode<KvElement::kE4m3, KvElement::kE4m3, 128>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);
extern template absl::Status LaunchCompactDecode<KvElement::kInt8, KvElement::kInt8, 64>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);
extern template absl::Status LaunchCompactDecode<KvElement::kInt8, KvElement::kInt8, 128>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);
extern template absl::Status LaunchCompactDecode<KvElement::kInt8, KvElement::kE4m3, 64>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);
extern template absl::Status LaunchCompactDecode<KvElement::kInt8, KvElement::kE4m3, 128>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);

}  // namespace device

namespace {

template <int kDim>
absl::Status LaunchFormat(KvFormatId format, const device::CompactDecodeArgs& args,
                          const device::DecodeLaunch& launch, cudaStream_t stream) {
  constexpr KvElement kBf16 = KvElement::kBf16, kE4m3 = KvElement::kE4m3, kInt8 = KvElement::kInt8;
  switch (format) {
    case KvFormatId::kBf16:
      return device::LaunchCompactDecode<kBf16, kBf16, kDim>(args, launch, stream);
    case KvFormatId::kFp8:
      return device::LaunchCompactDecode<kE4m3, kE4m3, kDim>(args, launch, stream);
    case KvFormatId::kInt8:
    case KvFormatId::kInt8H:
      return device::LaunchCompactDecode<kInt8, kInt8, kDim>(args, launch, stream);
    case KvFormatId::kK8V8:
      return device::LaunchCompactDecode<kInt8, kE4m3, kDim>(args, launch, stream);
  }
  return absl::InvalidArgumentError("compact_decode_attention: unknown format");
}

// Of all bytes of the pool as rows of 128; how many there are is not known here.
absl::StatusOr<CUtensorMap> PagesMap(const DeviceSpans& spans) {
  WINNOW_ASSIGN_OR_RETURN(const int major, DeviceAttribute<cudaDevAttrComputeCapabilityMajor>());
  if (major < 9) return CUtensorMap{};  // the portable code does not use it
  const uint64_t sizes[] = {64, uint64_t{1} << 31}, strides[] = {128};
  // What a format uses of a page: K and V, and a row of scales where it has them.
  const uint32_t codes = spans.head_dim == 64 ? 32 : 64;
  const uint32_t box[] = {64, spans.format == KvFormatId::kBf16 ? codes : codes + 1};
  return MakeBf16TensorMap(spans.pages, sizes, strides, box);
}

}  // namespace

absl::Status ValidateCompactDecodeAttention(const CompactDecodeAttentionCudaParams& p) {
  const DeviceSpans& spans = p.spans;
  WINNOW_RETURN_IF_ERROR(ValidateDeviceSpans("compact_decode_attention", spans));
  if (spans.head_dim != 64 && spans.head_dim != 128) {
    return absl::UnimplementedError(
        absl::StrCat("compact_decode_attention: head_dim=", spans.head_dim, " is not 64 or 128"));
  }
  if (p.num_seqs < 0 || p.num_seqs > kMaxDecodeRows / spans.num_kv_heads || p.num_heads < 1 ||
      p.num_heads % spans.num_kv_heads != 0 || p.layer < 0 || p.layer >= spans.num_layers ||
      p.plan.max_pieces < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("compact_decode_attention: num_seqs=", p.num_seqs, " num_heads=", p.num_heads,
                     " num_kv_heads=", spans.num_kv_heads, " layer=", p.layer, " of ",
                     spans.num_layers, " max_pieces=", p.plan.max_pieces));
  }
  if (p.num_heads / spans.num_kv_heads > kMaxDecodeGroup) {
    return absl::UnimplementedError(
        absl::StrCat("compact_decode_attention: ", p.num_heads / spans.num_kv_heads,
                     " query heads a KV head, more than ", kMaxDecodeGroup));
  }
  if (!(p.scale > 0.0f)) {
    return absl::InvalidArgumentError(absl::StrCat("compact_decode_attention: scale=", p.scale));
  }
  if (p.plan.pieces == nullptr || p.plan.num_pieces == nullptr || p.plan.next_piece == nullptr ||
      p.plan.arrivals == nullptr || p.plan.partial_out == nullptr ||
      p.plan.partial_norm == nullptr) {
    return absl::InvalidArgumentError("compact_decode_attention: an array of plan is null");
  }
  if (p.q == nullptr || (p.out_f32 == nullptr) == (p.out_bf16 == nullptr)) {
    return absl::InvalidArgumentError(
        "compact_decode_attention: q is null or not exactly one of out_f32 and out_bf16 is set");
  }
  if (!Aligned(p.q, 16) || !Aligned(p.out_f32, 16) || !Aligned(p.out_bf16, 8) ||
      !Aligned(p.plan.pieces, 32) || !Aligned(p.plan.partial_out, 16) ||
      !Aligned(p.plan.partial_norm, 8)) {
    return absl::InvalidArgumentError(
        "compact_decode_attention: q, an output or an array of plan is misaligned");
  }
  return absl::OkStatus();
}

absl::Status LaunchCompactDecodeAttention(const CompactDecodeAttentionCudaParams& p,
                                          StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateCompactDecodeAttention(p));
  if (p.num_seqs == 0) return absl::OkStatus();
  const DeviceSpans& spans = p.spans;
  const int64_t first_span =
      static_cast<int64_t>(p.layer) * spans.max_sequences * spans.num_kv_heads;
  const device::CompactDecodeArgs args = {
      .pieces = p.plan.pieces + static_cast<int64_t>(p.layer) * p.plan.max_pieces,
      .num_pieces = p.plan.num_pieces + p.layer,
      .next_piece = p.plan.next_piece + int64_t{2} * p.layer,
      .arrivals = p.plan.arrivals,
      .partial_out = p.plan.partial_out,
      .partial_norm = p.plan.partial_norm,
      .pages = spans.pages,
      .survivor_pages = spans.survivor_pages + first_span * spans.max_survivor_pages,
      .ring_pages = spans.ring_pages + first_span * spans.ring_pages_per_span(),
      .newest = spans.newest + first_span * spans.newest_stride(),
      .q = p.q,
      .out_f32 = p.out_f32,
      .out_bf16 = p.out_bf16,
      .newest_stride = spans.newest_stride(),
      .max_survivor_pages = spans.max_survivor_pages,
      .ring_pages_per_span = spans.ring_pages_per_span(),
      .max_pieces = p.plan.max_pieces,
      .group = p.num_heads / spans.num_kv_heads,
      .ring_slots = 0,  // set by the launch
      .gather_slots = 0,
      .scale_log2 = p.scale * std::numbers::log2e_v<float>,
      .rotated = KvFormatOf(spans.format).rotated};
  const int most_pages = spans.max_survivor_pages + spans.ring_pages_per_span() + 1;
  const int64_t most_pieces =
      int64_t{p.num_seqs} * spans.num_kv_heads * (most_pages / kPagesPerUnit + 2);
  device::DecodeLaunch launch = {
      .map = {},
      .num_rows = p.num_seqs * spans.num_kv_heads,
      .max_blocks = static_cast<int>(std::min<int64_t>(most_pieces, 1 << 16)),
      .overlap = p.overlap_launch};
  WINNOW_ASSIGN_OR_RETURN(launch.map, PagesMap(spans));
  return spans.head_dim == 64 ? LaunchFormat<64>(spans.format, args, launch, stream)
                              : LaunchFormat<128>(spans.format, args, launch, stream);
}

}  // namespace winnow::kernels
