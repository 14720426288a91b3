#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/dms_prefill_fp8.h"
#include "kernels/cuda/dms_prefill_fp8_sm90.cuh"
#include "kernels/cuda/launch.cuh"

namespace winnow::kernels {
namespace {

using Shape = internal::PrefillFp8Shape;

absl::Status Invalid(const char* field, int64_t value) {
  return absl::InvalidArgumentError(absl::StrCat("dms_prefill_fp8: ", field, "=", value));
}

absl::Status ValidateRows(const char* name, const DmsPrefillFp8Rows& rows) {
  if (rows.k == nullptr || rows.v == nullptr || rows.scales == nullptr || !Aligned(rows.k, 16) ||
      !Aligned(rows.v, 16) || !Aligned(rows.scales, 16)) {
    return absl::InvalidArgumentError(
        absl::StrCat("dms_prefill_fp8: ", name, " is null or not aligned to 16 bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

size_t DmsPrefillFp8ScratchBytes(const DmsPrefillBatch& batch) {
  return DmsPrefillScratchBytes(batch);
}

absl::Status ValidateDmsPrefillFp8Batch(const DmsPrefillFp8Batch& batch) {
  if (batch.rows.head_dim != kPrefillFp8Dim) {
    return absl::UnimplementedError(
        absl::StrCat("dms_prefill_fp8: head_dim=", batch.rows.head_dim, " is not 128"));
  }
  WINNOW_RETURN_IF_ERROR(ValidateRows("band", batch.band));
  WINNOW_RETURN_IF_ERROR(ValidateRows("compact", batch.compact));
  DmsPrefillBatch rows = batch.rows;  // the fields that are not read here, filled in
  rows.band_k = rows.compact_k = reinterpret_cast<Bf16*>(batch.band.k);
  rows.band_v = rows.compact_v = reinterpret_cast<Bf16*>(batch.band.v);
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillBatch(rows));
  if (rows.band_rows % 16 != 0) return Invalid("band_rows", rows.band_rows);
  if (rows.compact_rows % 16 != 0) return Invalid("compact_rows", rows.compact_rows);
  return absl::OkStatus();
}

absl::Status ValidateDmsPrefillFp8Compact(const DmsPrefillFp8CompactParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillFp8Batch(p.batch));
  const int row = p.batch.rows.num_kv_heads * kPrefillFp8Dim;
  if (p.kv_stride < row || p.kv_stride % 8 != 0) return Invalid("kv_stride", p.kv_stride);
  if (p.k == nullptr || p.v == nullptr || !Aligned(p.k, 16) || !Aligned(p.v, 16)) {
    return absl::InvalidArgumentError("dms_prefill_fp8: k or v is null or misaligned");
  }
  if (!Aligned(p.rows, 4) || !Aligned(p.prefix_rows, 4)) {
    return absl::InvalidArgumentError("dms_prefill_fp8: rows or prefix_rows is misaligned");
  }
  return absl::OkStatus();
}

absl::Status ValidateDmsPrefillFp8Attention(const DmsPrefillFp8CudaParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillFp8Batch(p.batch));
  const int row = p.batch.rows.num_kv_heads * p.batch.rows.group * kPrefillFp8Dim;
  if (p.q_stride < row || p.q_stride % 8 != 0) return Invalid("q_stride", p.q_stride);
  if (p.q == nullptr || p.out == nullptr || !Aligned(p.q, 16) || !Aligned(p.out, 16)) {
    return absl::InvalidArgumentError("dms_prefill_fp8: q or out is null or misaligned");
  }
  if (!(p.scale > 0.0f)) {
    return absl::InvalidArgumentError(absl::StrCat("dms_prefill_fp8: scale=", p.scale));
  }
  return absl::OkStatus();
}

absl::Status LaunchDmsPrefillFp8Attention(const DmsPrefillFp8CudaParams& params,
                                          StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillFp8Attention(params));
  const DmsPrefillBatch& b = params.batch.rows;
  if (b.batch == 0 || b.num_rows == 0 || b.max_band == 0) return absl::OkStatus();
  static const bool have_code = internal::HaveFp8Code<Shape>();
  if (!have_code) return absl::UnimplementedError("dms_prefill_fp8: needs code for sm_90a");
  return internal::EnqueuePrefillFp8Sm90<Shape>(params, stream);
}

}  // namespace winnow::kernels
