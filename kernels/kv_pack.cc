#include "kernels/kv_pack.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status_macros.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace winnow::kernels {
namespace {

void PutU32(uint32_t value, uint8_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = static_cast<uint8_t>(value >> (8 * i));
}

uint32_t GetU32(const uint8_t* in) {
  return uint32_t{in[0]} | uint32_t{in[1]} << 8 | uint32_t{in[2]} << 16 | uint32_t{in[3]} << 24;
}

size_t HeadBodyBytes(const KvLayout& layout, size_t num_survivors, size_t num_ring) {
  return (num_survivors + num_ring + 1) * TokenBytes(layout.format, layout.head_dim) + num_ring;
}

// Calls fn(page, first slot, slots) over slots [begin, end) of a table.
template <typename Fn>
void ForEachSlot(const KvLayout& layout, const PageTable& table, int begin, int end, Fn fn) {
  for (int slot = begin; slot < end; ++slot) {
    fn(layout.Page(table.At(slot / layout.slots_per_page)), slot % layout.slots_per_page);
  }
}

}  // namespace

size_t KvPackBytes(const KvLayout& layout, const Span* spans, int num_kv_heads) {
  size_t bytes = static_cast<size_t>(num_kv_heads) * kPackedHeadBytes;
  for (int g = 0; g < num_kv_heads; ++g) {
    bytes += HeadBodyBytes(layout, static_cast<size_t>(spans[g].num_survivors),
                           static_cast<size_t>(spans[g].num_ring));
  }
  return bytes;
}

void KvPackCpu(const KvLayout& layout, const Span* spans, int num_kv_heads, uint8_t* out) {
  const size_t token_bytes = TokenBytes(layout.format, layout.head_dim);
  for (int g = 0; g < num_kv_heads; ++g) {
    PutU32(static_cast<uint32_t>(spans[g].num_survivors), out);
    PutU32(static_cast<uint32_t>(spans[g].num_ring), out + 4);
    PutU32(spans[g].newest_evict, out + 8);
    out += kPackedHeadBytes;
  }
  for (int g = 0; g < num_kv_heads; ++g) {
    const Span& span = spans[g];
    WINNOW_CHECK(span.num_tokens > 0);
    const auto put = [&](const uint8_t* page, int slot) {
      CopyPageToRow(layout.format, layout.head_dim, page, slot, out);
      out += token_bytes;
    };
    // The ring from its oldest slot to its end, then from slot 0.
    const int tail = std::min(span.num_ring, layout.window - span.ring_start);
    ForEachSlot(layout, span.survivors, 0, span.num_survivors, put);
    ForEachSlot(layout, span.ring, span.ring_start, span.ring_start + tail, put);
    ForEachSlot(layout, span.ring, 0, span.num_ring - tail, put);
    std::memcpy(out, span.newest, token_bytes);
    out += token_bytes;
    if (span.num_ring > 0) {
      std::memcpy(out, span.ring_evict + span.ring_start, static_cast<size_t>(tail));
      std::memcpy(out + tail, span.ring_evict, static_cast<size_t>(span.num_ring - tail));
      out += span.num_ring;
    }
  }
}

absl::Status ParsePacked(const KvLayout& layout, int num_kv_heads, int num_tokens,
                         const uint8_t* data, size_t size, PackedHead* heads) {
  if (num_tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("num_tokens=", num_tokens, " is below 1"));
  }
  const size_t header = static_cast<size_t>(num_kv_heads) * kPackedHeadBytes;
  if (size < header) {
    return absl::DataLossError(
        absl::StrCat("packed layer of ", size, " bytes is shorter than its header of ", header));
  }
  // Each token but the newest has entered the ring; what is not there has left.
  const uint32_t ring = static_cast<uint32_t>(std::min(layout.window, num_tokens - 1));
  const uint32_t left = static_cast<uint32_t>(num_tokens - 1) - ring;
  size_t expected = header;
  for (int g = 0; g < num_kv_heads; ++g) {
    const uint8_t* in = data + static_cast<size_t>(g) * kPackedHeadBytes;
    PackedHead& head = heads[g];
    head.num_survivors = GetU32(in);
    head.num_ring = GetU32(in + 4);
    head.newest_evict = in[8];
    if (head.num_ring != ring) {
      return absl::InvalidArgumentError(absl::StrCat("head ", g, ": ring=", head.num_ring, ", but ",
                                                     num_tokens, " tokens leave ", ring));
    }
    if (head.num_survivors > left || (layout.window == 0 && head.num_survivors != left)) {
      return absl::InvalidArgumentError(absl::StrCat("head ", g, ": survivors=", head.num_survivors,
                                                     " of ", left, " tokens past the window"));
    }
    if (head.newest_evict > (layout.shift == 0 && layout.window > 0 ? 1 : 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("head ", g, ": newest_evict=", int{head.newest_evict}));
    }
    if (in[9] != 0 || in[10] != 0 || in[11] != 0) {
      return absl::DataLossError(absl::StrCat("head ", g, ": padding is not zero"));
    }
    expected += HeadBodyBytes(layout, head.num_survivors, head.num_ring);
  }
  if (size != expected) {
    return absl::DataLossError(
        absl::StrCat("packed layer has ", size, " bytes, its counts say ", expected));
  }
  const uint8_t* in = data + header;
  for (int g = 0; g < num_kv_heads; ++g) {
    in += HeadBodyBytes(layout, heads[g].num_survivors, heads[g].num_ring);
    for (const uint8_t* flag = in - heads[g].num_ring; flag < in; ++flag) {
      if (*flag > 1) {
        return absl::DataLossError(absl::StrCat("head ", g, ": ring flag ", int{*flag}));
      }
    }
  }
  return absl::OkStatus();
}

void KvUnpackCpu(const KvLayout& layout, int num_kv_heads, int num_tokens, const uint8_t* data,
                 const PackedHead* heads, Span* spans) {
  const size_t token_bytes = TokenBytes(layout.format, layout.head_dim);
  const uint8_t* in = data + static_cast<size_t>(num_kv_heads) * kPackedHeadBytes;
  for (int g = 0; g < num_kv_heads; ++g) {
    Span& span = spans[g];
    const auto put = [&](uint8_t* page, int slot) {
      CopyRowToPage(layout.format, layout.head_dim, in, page, slot);
      in += token_bytes;
    };
    span.num_survivors = static_cast<int>(heads[g].num_survivors);
    span.num_ring = static_cast<int>(heads[g].num_ring);
    span.ring_start = 0;
    span.num_tokens = num_tokens;
    span.newest_evict = heads[g].newest_evict;
    ForEachSlot(layout, span.survivors, 0, span.num_survivors, put);
    ForEachSlot(layout, span.ring, 0, span.num_ring, put);
    std::memcpy(span.newest, in, token_bytes);
    in += token_bytes;
    if (span.num_ring > 0) {
      std::memcpy(span.ring_evict, in, static_cast<size_t>(span.num_ring));
      in += span.num_ring;
    }
  }
}

namespace {

constexpr std::array<uint32_t, 256> MakeCrcTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) != 0 ? 0x82f63b78u : 0u);
    table[i] = crc;
  }
  return table;
}

constexpr std::array<uint32_t, 256> kCrcTable = MakeCrcTable();

uint32_t CrcTable(uint32_t crc, const uint8_t* p, size_t size) {
  for (size_t i = 0; i < size; ++i) crc = kCrcTable[(crc ^ p[i]) & 0xffu] ^ (crc >> 8);
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t CrcSse42(uint32_t crc, const uint8_t* p, size_t size) {
  uint64_t wide = crc;
  for (; size >= 8; p += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  return CrcTable(static_cast<uint32_t>(wide), p, size);
}
#endif

}  // namespace

uint32_t Crc32c(const void* data, size_t size, uint32_t seed) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return ~CrcSse42(~seed, p, size);
#endif
  return ~CrcTable(~seed, p, size);
}

}  // namespace winnow::kernels
