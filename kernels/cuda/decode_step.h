#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/device_spans.h"

// The memory side of a decode step, for all layers at once and without the host: every
// span's counters advance by one token and the pages it needs for it are taken from one
// free list. What moves is written later, layer by layer, by decode_prepare.
namespace winnow::kernels {

// Pages that no span holds; device memory.
struct DevicePagePool {
  int32_t* free_pages = nullptr;  // [capacity]: the first *num_free are free
  int32_t* num_free = nullptr;    // never below 0
  // Set to 1, and never back, when a page was needed and none was left or a span's table was
  // full. Such a span did not advance: counters, tables and list still say who holds what, so
  // the sequences can be released and later steps go on. Until then what the step computed
  // for its sequences is worthless, as some of a sequence's spans may have advanced.
  int32_t* exhausted = nullptr;
};

struct DecodeStepParams {
  DeviceSpans spans;
  DevicePagePool pool;
  const int32_t* slots = nullptr;  // device [num_seqs]: all distinct; < 0: no sequence
  int num_seqs = 0;
};

// INVALID_ARGUMENT for a null pointer or a bad shape.
absl::Status ValidateDecodeStep(const DecodeStepParams& params);
// One token enters each span of each sequence: state is afterwards as AdvanceSpan() leaves
// it. A span takes at most one page, for its ring or its survivors.
absl::Status LaunchDecodeStep(const DecodeStepParams& params, StreamHandle stream);
// Gives all pages of the sequences back and clears their states.
absl::Status LaunchReleaseSequences(const DecodeStepParams& params, StreamHandle stream);

}  // namespace winnow::kernels
