#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/kv_pack.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/kv_pack.h"

// A flat row is made of 4-byte words (K, V, the two scales). A warp moves a run of tokens whose
// slots are neighbours in a page, lane l words l, l + 32, ... of each of their rows. Because of the
// ring's flags before them, rows in staging may start at any byte; then a warp moves one token at a
// time, and words are shifted against those of the neighbour lane on their way.
namespace winnow::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kAlign = 16;  // of items in staging
constexpr uint32_t kAll = 0xffffffffu;

// A layer of a sequence is an item; a head of an item its own block or blocks.
struct Args {
  const SpanState* state;
  const int32_t* survivor_pages;
  const int32_t* ring_pages;
  uint8_t* newest;
  uint8_t* ring_evict;
  uint8_t* pages;
  const int32_t* slots;
  int64_t page_bytes, newest_stride;
  int window, shift, max_sequences, num_kv_heads, max_survivor_pages, ring_pages_per_span;
  int num_items, first_layer, num_layers, slots_per_page;
  int k_words, v_words, scale_words;  // of a flat row
};

Args MakeArgs(const DeviceSpans& spans, const int32_t* slots, int num_seqs, int first_layer,
              int num_layers) {
  const KvFormat& f = KvFormatOf(spans.format);
  return {.state = spans.state,
          .survivor_pages = spans.survivor_pages,
          .ring_pages = spans.ring_pages,
          .newest = spans.newest,
          .ring_evict = spans.ring_evict,
          .pages = spans.pages,
          .slots = slots,
          .page_bytes = static_cast<int64_t>(PageBytes(spans.head_dim)),
          .newest_stride = spans.newest_stride(),
          .window = spans.window,
          .shift = spans.shift,
          .max_sequences = spans.max_sequences,
          .num_kv_heads = spans.num_kv_heads,
          .max_survivor_pages = spans.max_survivor_pages,
          .ring_pages_per_span = spans.ring_pages_per_span(),
          .num_items = num_seqs * num_layers,
          .first_layer = first_layer,
          .num_layers = num_layers,
          .slots_per_page = spans.slots_per_page(),
          .k_words = static_cast<int>(KvElementBytes(f.k)) * spans.head_dim / 4,
          .v_words = static_cast<int>(KvElementBytes(f.v)) * spans.head_dim / 4,
          .scale_words = static_cast<int>(KvScaleBytes(f.k) + KvScaleBytes(f.v)) / 4};
}

__device__ __forceinline__ int RowWords(const Args& a) {
  return a.k_words + a.v_words + a.scale_words;
}

// The span of an item's first head; -1: no sequence.
__device__ __forceinline__ int64_t FirstSpan(const Args& a, int item) {
  const int slot = a.slots[item / a.num_layers];
  if (slot < 0) return -1;
  const int64_t layer = a.first_layer + item % a.num_layers;
  return (layer * a.max_sequences + slot) * a.num_kv_heads;
}

__device__ __forceinline__ int64_t BodyBytes(const Args& a, int num_survivors, int num_ring) {
  return (int64_t{num_survivors} + num_ring + 1) * RowWords(a) * 4 + num_ring;
}

// Where the parts of token `i` of a span lie, in age order; k null: no such place.
struct TokenPlace {
  uint8_t *k = nullptr, *v = nullptr, *k_scale = nullptr, *v_scale = nullptr;
};
__device__ __forceinline__ TokenPlace PlaceOf(const Args& a, int64_t span, const SpanState& state,
                                              int i) {
  uint8_t* base = nullptr;
  int slots = 1, slot = 0;
  if (i == state.num_survivors + state.num_ring) {
    base = a.newest + span * a.newest_stride;
  } else {
    const bool ring = i >= state.num_survivors;
    slots = a.slots_per_page;
    slot = i;
    if (ring) {
      slot = i - state.num_survivors + state.ring_start;
      if (slot >= a.window) slot -= a.window;
    }
    const int table_size = ring ? a.ring_pages_per_span : a.max_survivor_pages;
    const int32_t* table = (ring ? a.ring_pages : a.survivor_pages) + span * table_size;
    const int page = slot / slots < table_size ? table[slot / slots] : -1;
    if (page < 0) return {};
    base = a.pages + page * a.page_bytes;
    slot %= slots;
  }
  const int k_bytes = 4 * a.k_words, v_bytes = 4 * a.v_words;
  uint8_t* scales = base + slots * (k_bytes + v_bytes);
  return {.k = base + slot * k_bytes,
          .v = base + slots * k_bytes + slot * v_bytes,
          .k_scale = scales + 2 * slot,
          .v_scale = scales + 2 * (slots + slot)};
}

__device__ __forceinline__ uint32_t LoadWord(const Args& a, const TokenPlace& at, int word) {
  if (word < a.k_words) return *reinterpret_cast<const uint32_t*>(at.k + 4 * word);
  word -= a.k_words;
  if (word < a.v_words) return *reinterpret_cast<const uint32_t*>(at.v + 4 * word);
  if (word - a.v_words >= a.scale_words) return 0;
  return *reinterpret_cast<const uint16_t*>(at.k_scale) |
         uint32_t{*reinterpret_cast<const uint16_t*>(at.v_scale)} << 16;
}

__device__ __forceinline__ void StoreWord(const Args& a, const TokenPlace& at, int word,
                                          uint32_t value) {
  if (word < a.k_words) {
    *reinterpret_cast<uint32_t*>(at.k + 4 * word) = value;
  } else if (word < a.k_words + a.v_words) {
    *reinterpret_cast<uint32_t*>(at.v + 4 * (word - a.k_words)) = value;
  } else if (word < RowWords(a)) {
    *reinterpret_cast<uint16_t*>(at.k_scale) = static_cast<uint16_t>(value);
    *reinterpret_cast<uint16_t*>(at.v_scale) = static_cast<uint16_t>(value >> 16);
  }
}

// Writes a row, this lane's words in w, to `out`. kPasses * 32 > row words.
template <int kPasses>
__device__ __forceinline__ void WriteRow(const uint32_t (&w)[kPasses], int row_words,
                                         uint8_t* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int odd = static_cast<int>(reinterpret_cast<uintptr_t>(out) & 3);
  uint32_t* aligned = reinterpret_cast<uint32_t*>(out - odd);
  uint32_t before = 0;  // the word before the pass's first
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int word = lane + 32 * pass;
    uint32_t low = __shfl_up_sync(kAll, w[pass], 1);
    if (lane == 0) low = before;
    before = __shfl_sync(kAll, w[pass], 31);
    const uint32_t value = odd == 0 ? w[pass] : __funnelshift_l(low, w[pass], 8 * odd);
    if (word < row_words && (odd == 0 || word > 0)) {
      aligned[word] = value;
    } else if (odd != 0 && word == 0) {
      for (int i = odd; i < 4; ++i) out[i - odd] = static_cast<uint8_t>(value >> (8 * i));
    } else if (odd != 0 && word == row_words) {
      for (int i = 0; i < odd; ++i) {
        out[4 * row_words - odd + i] = static_cast<uint8_t>(value >> (8 * i));
      }
    }
  }
}

// The other way. May read up to three bytes on both sides of the row, within aligned words.
template <int kPasses>
__device__ __forceinline__ void ReadRow(const uint8_t* in, int row_words, uint32_t (&w)[kPasses]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int odd = static_cast<int>(reinterpret_cast<uintptr_t>(in) & 3);
  const uint32_t* aligned = reinterpret_cast<const uint32_t*>(in - odd);
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int word = lane + 32 * pass;
    w[pass] = 0;
    if (word < row_words || (odd != 0 && word == row_words)) w[pass] = aligned[word];
  }
  uint32_t after = 0;
#pragma unroll
  for (int pass = kPasses - 1; pass >= 0; --pass) {
    uint32_t high = __shfl_down_sync(kAll, w[pass], 1);
    if (lane == 31) high = after;
    after = __shfl_sync(kAll, w[pass], 0);
    w[pass] = __funnelshift_r(w[pass], high, 8 * odd);
  }
}

constexpr int kRun = 8;  // tokens of a run

// Rows that start at words, and runs that end with pages.
__device__ __forceinline__ bool RowsAreWords(const Args& a, const uint8_t* body) {
  return reinterpret_cast<uintptr_t>(body) % 4 == 0 && a.slots_per_page % kRun == 0;
}

// Moves all tokens of a span but the newest between pages and rows (`body`, which is not written
// unless kPack) by the warps of a grid of `num_warps`, this one being `warp`.
template <bool kPack>
__device__ __forceinline__ void MoveRuns(const Args& a, int64_t span, const SpanState& state,
                                         uint8_t* body, int warp, int num_warps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row_words = RowWords(a);
  const int survivor_runs = (state.num_survivors + kRun - 1) / kRun;
  // Ring slots in use; from the first one on where the ring starts later.
  const int ring_slots = min(a.window, state.ring_start + state.num_ring);
  const int runs = survivor_runs + (ring_slots + kRun - 1) / kRun;
  for (int run = warp; run < runs; run += num_warps) {
    const bool ring = run >= survivor_runs;
    const int first = (ring ? run - survivor_runs : run) * kRun;
    const int table_size = ring ? a.ring_pages_per_span : a.max_survivor_pages;
    const int32_t* table = (ring ? a.ring_pages : a.survivor_pages) + span * table_size;
    const int entry = first / a.slots_per_page;
    const int page = entry < table_size ? table[entry] : -1;
    if (page < 0) continue;
    // The row of the slot first + j; below 0: none.
    const auto row_of = [&](int j) {
      const int slot = first + j;
      if (!ring) return slot < state.num_survivors ? slot : -1;
      int age = slot - state.ring_start;
      if (age < 0) age += a.window;
      return slot < ring_slots && age < state.num_ring ? state.num_survivors + age : -1;
    };
    int row[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) row[j] = row_of(j);
    const int slot = first - entry * a.slots_per_page;
    uint32_t* part = reinterpret_cast<uint32_t*>(a.pages + page * a.page_bytes);
    uint32_t* rows = reinterpret_cast<uint32_t*>(body);
    for (const int words : {a.k_words, a.v_words}) {
      for (int word = lane; word < words; word += 32) {
        uint32_t* in_page = part + slot * words + word;
        uint32_t* in_row = rows + word;
        uint32_t w[kRun];
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          if (row[j] < 0) continue;
          w[j] = kPack ? in_page[j * words] : in_row[int64_t{row[j]} * row_words];
        }
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          if (row[j] < 0) continue;
          (kPack ? in_row[int64_t{row[j]} * row_words] : in_page[j * words]) = w[j];
        }
      }
      part += a.slots_per_page * words;
      rows += words;
    }
    const int scale_row = lane < kRun ? row_of(lane) : -1;
    if (a.scale_words == 0 || scale_row < 0) continue;
    uint16_t* scale = reinterpret_cast<uint16_t*>(part) + slot + lane;
    uint32_t* in_row = rows + int64_t{scale_row} * row_words;
    if constexpr (kPack) {
      *in_row = scale[0] | uint32_t{scale[a.slots_per_page]} << 16;
    } else {
      scale[0] = static_cast<uint16_t>(*in_row);
      scale[a.slots_per_page] = static_cast<uint16_t>(*in_row >> 16);
    }
  }
}

// Finds each item's place. One block of kThreads.
__global__ void __launch_bounds__(kThreads)
    PlaceItemsKernel(const Args a, int64_t staging_bytes, ByteRange* ranges) {
  __shared__ int64_t sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int each = (a.num_items + kThreads - 1) / kThreads;
  const int begin = min(thread * each, a.num_items), end = min(begin + each, a.num_items);
  const auto bytes_of = [&](int item) {
    const int64_t span = FirstSpan(a, item);
    if (span < 0) return int64_t{0};
    int64_t bytes = a.num_kv_heads * static_cast<int64_t>(kPackedHeadBytes);
    for (int g = 0; g < a.num_kv_heads; ++g) {
      const SpanState& state = a.state[span + g];
      bytes += BodyBytes(a, state.num_survivors, state.num_ring);
    }
    return bytes;
  };
  const auto padded = [](int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; };
  int64_t own = 0;
  for (int item = begin; item < end; ++item) {
    ranges[item].bytes = bytes_of(item);
    own += padded(ranges[item].bytes);
  }
  sums[thread] = own;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const int64_t other = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += other;
  }
  int64_t offset = sums[thread] - own;
  for (int item = begin; item < end; ++item) {
    const int64_t bytes = ranges[item].bytes;
    ranges[item].offset = offset + bytes <= staging_bytes ? offset : -1;
    offset += padded(bytes);
  }
}

// Grid (blocks of a head, heads, items), block kThreads.
template <int kPasses>
__global__ void __launch_bounds__(kThreads)
    PackKernel(const Args a, const ByteRange* ranges, uint8_t* staging) {
  const int item = static_cast<int>(blockIdx.z), g = static_cast<int>(blockIdx.y);
  const ByteRange range = ranges[item];
  const int64_t first_span = FirstSpan(a, item);
  if (first_span < 0 || range.offset < 0) return;
  const int64_t span = first_span + g;
  const SpanState state = a.state[span];
  uint8_t* out = staging + range.offset;
  uint8_t* body = out + a.num_kv_heads * static_cast<int64_t>(kPackedHeadBytes);
  for (int h = 0; h < g; ++h) {
    body += BodyBytes(a, a.state[first_span + h].num_survivors, a.state[first_span + h].num_ring);
  }
  const int row_words = RowWords(a);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int live = state.num_survivors + state.num_ring + 1;
  const int step = static_cast<int>(gridDim.x) * kWarps;
  int begin = static_cast<int>(blockIdx.x) * kWarps + warp;
  if (RowsAreWords(a, body)) {
    MoveRuns<true>(a, span, state, body, begin, step);
    begin += live - 1;  // the newest is left
  }
#pragma unroll 2
  for (int i = begin; i < live; i += step) {
    const TokenPlace at = PlaceOf(a, span, state, i);
    uint32_t w[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      w[pass] = at.k == nullptr ? 0 : LoadWord(a, at, lane + 32 * pass);
    }
    WriteRow<kPasses>(w, row_words, body + int64_t{i} * row_words * 4);
  }
  if (blockIdx.x != 0) return;
  const uint8_t* evict = a.ring_evict + span * (int64_t{a.window} + 1);
  uint8_t* flags = body + int64_t{live} * row_words * 4;
  for (int i = static_cast<int>(threadIdx.x); i < state.num_ring; i += kThreads) {
    const int slot = state.ring_start + i;
    flags[i] = evict[slot >= a.window ? slot - a.window : slot];
  }
  if (threadIdx.x == 0) {
    uint32_t* head = reinterpret_cast<uint32_t*>(out) + 3 * g;
    head[0] = static_cast<uint32_t>(state.num_survivors);
    head[1] = static_cast<uint32_t>(state.num_ring);
    head[2] = a.window > 0 && a.shift == 0 ? evict[a.window] : 0;
  }
}

// Grid as above.
template <int kPasses>
__global__ void __launch_bounds__(kThreads)
    UnpackKernel(const Args a, const ByteRange* ranges, const uint8_t* staging,
                 const int32_t* num_tokens, SpanState* states) {
  const int item = static_cast<int>(blockIdx.z), g = static_cast<int>(blockIdx.y);
  const ByteRange range = ranges[item];
  const int64_t first_span = FirstSpan(a, item);
  if (first_span < 0 || range.offset < 0) return;
  const uint8_t* in = staging + range.offset;
  const uint32_t* heads = reinterpret_cast<const uint32_t*>(in);
  const int row_words = RowWords(a);
  const int most = a.max_survivor_pages * a.slots_per_page;
  const auto state_of = [&](int h) {
    return SpanState{.num_survivors = min(max(static_cast<int>(heads[3 * h]), 0), most),
                     .num_ring = min(max(static_cast<int>(heads[3 * h + 1]), 0), a.window),
                     .ring_start = 0,
                     .num_tokens = num_tokens[item / a.num_layers]};
  };
  const uint8_t* body = in + a.num_kv_heads * static_cast<int64_t>(kPackedHeadBytes);
  for (int h = 0; h < g; ++h) body += BodyBytes(a, state_of(h).num_survivors, state_of(h).num_ring);
  const SpanState state = state_of(g);
  if (body + BodyBytes(a, state.num_survivors, state.num_ring) > in + range.bytes) return;
  const int64_t span = first_span + g;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int live = state.num_survivors + state.num_ring + 1;
  const int step = static_cast<int>(gridDim.x) * kWarps;
  int begin = static_cast<int>(blockIdx.x) * kWarps + warp;
  if (RowsAreWords(a, body)) {
    MoveRuns<false>(a, span, state, const_cast<uint8_t*>(body), begin, step);
    begin += live - 1;  // the newest is left
  }
#pragma unroll 2
  for (int i = begin; i < live; i += step) {
    const TokenPlace at = PlaceOf(a, span, state, i);
    uint32_t w[kPasses];
    ReadRow<kPasses>(body + int64_t{i} * row_words * 4, row_words, w);
    if (at.k == nullptr) continue;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) StoreWord(a, at, lane + 32 * pass, w[pass]);
  }
  if (blockIdx.x != 0) return;
  uint8_t* evict = a.ring_evict + span * (int64_t{a.window} + 1);
  const uint8_t* flags = body + int64_t{live} * row_words * 4;
  for (int i = static_cast<int>(threadIdx.x); i < state.num_ring; i += kThreads) {
    evict[i] = flags[i];
  }
  if (threadIdx.x == 0) {
    if (a.window > 0) evict[a.window] = static_cast<uint8_t>(heads[3 * g + 2]);
    states[span] = state;
  }
}

absl::Status CheckSpans(const char* op, const DeviceSpans& spans, int num_seqs, int first_layer,
                        int num_layers) {
  WINNOW_RETURN_IF_ERROR(ValidateHeadDim(spans.head_dim));
  if (static_cast<size_t>(spans.format) >= std::size(kKvFormats)) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": format=", static_cast<int>(spans.format)));
  }
  if (spans.pages == nullptr || spans.state == nullptr || spans.survivor_pages == nullptr ||
      spans.newest == nullptr ||
      (spans.window > 0 && (spans.ring_pages == nullptr || spans.ring_evict == nullptr))) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": a pointer of spans is null"));
  }
  if (spans.window < 0 || spans.num_kv_heads < 1 || spans.num_kv_heads > 65535 ||
      spans.max_sequences < 1 || spans.max_survivor_pages < 0) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": bad spans window=", spans.window,
                                                   " num_kv_heads=", spans.num_kv_heads,
                                                   " max_sequences=", spans.max_sequences));
  }
  if (num_seqs < 0 || first_layer < 0 || num_layers < 0 || first_layer > spans.num_layers ||
      num_layers > spans.num_layers - first_layer || int64_t{num_seqs} * num_layers > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": bad shape num_seqs=", num_seqs,
                                                   " first_layer=", first_layer,
                                                   " num_layers=", num_layers));
  }
  return absl::OkStatus();
}

// Blocks for a head: as many as the largest has work for, within what fills the device.
dim3 GridOf(const DeviceSpans& spans, int num_items) {
  const int64_t most_tokens =
      int64_t{spans.max_survivor_pages} * spans.slots_per_page() + spans.window + 1;
  const int64_t heads = int64_t{num_items} * spans.num_kv_heads;
  const int64_t blocks = std::min((most_tokens + 63) / 64, std::max<int64_t>(2400 / heads, 8));
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(spans.num_kv_heads),
              static_cast<unsigned>(num_items));
}

// Calls launch with the least number of passes of a warp that is more than a row's words.
template <typename Launch>
absl::Status WithPasses(const Args& args, Launch launch) {
  const int words = args.k_words + args.v_words + args.scale_words;
  if (words < 64) {
    launch(std::integral_constant<int, 2>());
  } else if (words < 96) {
    launch(std::integral_constant<int, 3>());
  } else if (words < 160) {
    launch(std::integral_constant<int, 5>());
  } else {
    launch(std::integral_constant<int, 9>());
  }
  return CudaStatus(cudaGetLastError());
}
static_assert(kMaxTokenBytes / 4 < 9 * 32);

}  // namespace

absl::Status ValidateKvPackCuda(const KvPackCudaParams& p) {
  WINNOW_RETURN_IF_ERROR(CheckSpans("kv_pack", p.spans, p.num_seqs, p.first_layer, p.num_layers));
  if (p.slots == nullptr || p.staging == nullptr || p.ranges == nullptr) {
    return absl::InvalidArgumentError("kv_pack: slots, staging or ranges is null");
  }
  if (!Aligned(p.staging, kAlign) || p.staging_bytes < 0 || p.staging_bytes % kAlign != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "kv_pack: staging or staging_bytes=", p.staging_bytes, " is not a multiple of 16"));
  }
  return absl::OkStatus();
}

absl::Status LaunchKvPack(const KvPackCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateKvPackCuda(p));
  const Args args = MakeArgs(p.spans, p.slots, p.num_seqs, p.first_layer, p.num_layers);
  if (args.num_items == 0) return absl::OkStatus();
  PlaceItemsKernel<<<1, kThreads, 0, stream>>>(args, p.staging_bytes, p.ranges);
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetLastError()));
  WINNOW_RETURN_IF_ERROR(WithPasses(args, [&](auto passes) {
    PackKernel<passes.value>
        <<<GridOf(p.spans, args.num_items), kThreads, 0, stream>>>(args, p.ranges, p.staging);
  }));
  if (p.crc == nullptr) return absl::OkStatus();
  return LaunchCrc32c({.data = p.staging,
                       .ranges = p.ranges,
                       .crc = p.crc,
                       .num_ranges = args.num_items,
                       .max_bytes = p.staging_bytes / args.num_items},
                      stream);
}

absl::Status ValidateKvUnpackCuda(const KvUnpackCudaParams& p) {
  WINNOW_RETURN_IF_ERROR(CheckSpans("kv_unpack", p.spans, p.num_seqs, p.first_layer, p.num_layers));
  if (p.slots == nullptr || p.num_tokens == nullptr || p.staging == nullptr ||
      p.ranges == nullptr) {
    return absl::InvalidArgumentError("kv_unpack: slots, num_tokens, staging or ranges is null");
  }
  if (!Aligned(p.staging, kAlign)) {
    return absl::InvalidArgumentError("kv_unpack: staging is not a multiple of 16");
  }
  return absl::OkStatus();
}

absl::Status LaunchKvUnpack(const KvUnpackCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateKvUnpackCuda(p));
  const Args args = MakeArgs(p.spans, p.slots, p.num_seqs, p.first_layer, p.num_layers);
  if (args.num_items == 0) return absl::OkStatus();
  return WithPasses(args, [&](auto passes) {
    UnpackKernel<passes.value><<<GridOf(p.spans, args.num_items), kThreads, 0, stream>>>(
        args, p.ranges, p.staging, p.num_tokens, p.spans.state);
  });
}

}  // namespace winnow::kernels
