#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "common/kv/kv_cache.h"
#include "winnow/v1/types.pb.h"

namespace winnow {

// What this process says about itself in PeerHello and WatchLoad.
// weights_digest: SHA-256 as Model::digest(); decision_rule: DescribeRule(); kv_mode, architecture,
// compute_path: as types.proto says.
v1::LayoutFingerprint MakeFingerprint(const KvCacheOptions& cache, const std::string& kv_mode,
                                      const std::string& decision_rule,
                                      const std::array<uint8_t, 32>& weights_digest,
                                      const std::string& architecture,
                                      const std::string& compute_path);

// FAILED_PRECONDITION that names the first field that differs, with both values.
// compute_path is not compared: it moves last bits at most, and says how where tokens
// differ.
absl::Status CheckFingerprint(const v1::LayoutFingerprint& ours,
                              const v1::LayoutFingerprint& theirs);

}  // namespace winnow
