#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/crc32c.h"
#include "kernels/cuda/device_spans.h"

// KvPackCpu() and KvUnpackCpu() of kv_pack.h between spans in device memory and contiguous
// staging, in the same bytes: what one packs the other unpacks. Lengths are read on the device.
// A token whose place in a table is past its end or holds no page (a number below 0), which a
// whole span never has, packs as zeros and is dropped in unpacking.
namespace winnow::kernels {

// Packs layers [first_layer, first_layer + num_layers) of each sequence, item by item in the order
// of `ranges`, every item at a multiple of 16 bytes.
struct KvPackCudaParams {
  DeviceSpans spans;
  const int32_t* slots = nullptr;  // device [num_seqs]; < 0: no sequence, an empty range
  int num_seqs = 0;                // >= 0; num_seqs * num_layers <= 65535
  int first_layer = 0, num_layers = 0;
  uint8_t* staging = nullptr;  // device [staging_bytes]; 16-byte aligned
  int64_t staging_bytes = 0;   // a multiple of 16
  // Device out [num_seqs, num_layers]: where in staging the layer lies. One that does not fit
  // any more is not written: its offset is -1, its `bytes` what it needs.
  ByteRange* ranges = nullptr;
  uint32_t* crc = nullptr;  // device out [num_seqs, num_layers], of each range; may be null
};

// INVALID_ARGUMENT for a null pointer or a bad shape. REQUIRES: every span holds a token.
absl::Status ValidateKvPackCuda(const KvPackCudaParams& params);
absl::Status LaunchKvPack(const KvPackCudaParams& params, StreamHandle stream);

// Fills spans of sequences, whose tables hold the pages, from packed layers.
// REQUIRES: ParsePacked() has accepted the bytes. A count beyond a table is cut to it and pages
// below 0 are not followed, so that rubbish harms no other sequence.
struct KvUnpackCudaParams {
  DeviceSpans spans;
  const int32_t* slots = nullptr;       // device [num_seqs], all distinct; < 0: no sequence
  const int32_t* num_tokens = nullptr;  // device [num_seqs], >= 1
  int num_seqs = 0;
  int first_layer = 0, num_layers = 0;
  const uint8_t* staging = nullptr;   // device; 16-byte aligned
  const ByteRange* ranges = nullptr;  // device [num_seqs, num_layers]; offsets multiples of 16
};

absl::Status ValidateKvUnpackCuda(const KvUnpackCudaParams& params);
absl::Status LaunchKvUnpack(const KvUnpackCudaParams& params, StreamHandle stream);

}  // namespace winnow::kernels
