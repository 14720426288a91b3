#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "common/kv/kv_cache.h"

namespace winnow {

// What both sides of a transfer must agree on about the cache, field by field.
struct LayoutFingerprint {
  std::string format;  // KvFormatName()
  int32_t num_layers = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t window = 0;
  int32_t shift = 0;  // 0 when dense
};

LayoutFingerprint FingerprintOf(const KvCacheOptions& options);

// FAILED_PRECONDITION that names the first differing field and both values.
absl::Status CheckSameLayout(const LayoutFingerprint& ours, const LayoutFingerprint& theirs);

}  // namespace winnow
