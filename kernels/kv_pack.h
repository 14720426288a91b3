#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/kv_span.h"

// One layer of a sequence as contiguous bytes that depend on its tokens alone,
// not on page ids or the ring's rotation. Little-endian:
//   for each KV head:  u32 survivors  u32 ring  u8 newest_evict  u8[3] zero
//   for each KV head:  survivors' flat rows, ring's flat rows, newest flat row
//                      (all oldest first), ring flags u8 [ring] (1: evict)
namespace winnow::kernels {

inline constexpr size_t kPackedHeadBytes = 12;

struct PackedHead {
  uint32_t num_survivors = 0;
  uint32_t num_ring = 0;
  uint8_t newest_evict = 0;
};

// Exact size of the packed spans [num_kv_heads].
size_t KvPackBytes(const KvLayout& layout, const Span* spans, int num_kv_heads);
// Writes exactly KvPackBytes() to `out`. REQUIRES: every span holds a token.
void KvPackCpu(const KvLayout& layout, const Span* spans, int num_kv_heads, uint8_t* out);

// Checks bytes from a peer for a sequence of num_tokens >= 1 tokens and fills
// heads [num_kv_heads]. INVALID_ARGUMENT for a count that no such sequence can
// have, DATA_LOSS where size, padding or a flag disagrees with the counts.
absl::Status ParsePacked(const KvLayout& layout, int num_kv_heads, int num_tokens,
                         const uint8_t* data, size_t size, PackedHead* heads);
// Fills empty spans whose tables hold the pages for `heads`. REQUIRES:
// ParsePacked() gave `heads` for the same bytes.
void KvUnpackCpu(const KvLayout& layout, int num_kv_heads, int num_tokens, const uint8_t* data,
                 const PackedHead* heads, Span* spans);

// CRC-32C (Castagnoli) of data; `seed` is the value for the bytes before it.
uint32_t Crc32c(const void* data, size_t size, uint32_t seed = 0);

}  // namespace winnow::kernels
