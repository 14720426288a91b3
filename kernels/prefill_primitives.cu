#include <cuda_runtime.h>

#include <algorithm>

#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/prefill_primitives.h"

namespace winnow::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBatch = 4;  // rows in flight
constexpr int kMaxGridRows = 65535;

// grid (pieces of a row's plane, rows), block kThreads; a thread moves elements
// of type T, stride gridDim.x * kThreads; rows beyond gridDim.y in turns.
// `row_elems` is row_bytes / sizeof(T). No shared memory.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    LeftPad2dKernel(const LeftPad2dParams params, int64_t row_elems) {
  const int64_t plane = params.seq * row_elems;
  for (int64_t n = blockIdx.y; n < params.num_rows; n += gridDim.y) {
    const int len = min(max(params.lens[n], 0), params.seq);
    const int64_t pad = (params.seq - len) * row_elems;
    const T* in = static_cast<const T*>(params.in) + n * plane;
    T* out = static_cast<T*>(params.out) + n * plane;
    for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < plane;
         i += gridDim.x * int64_t{kThreads}) {
      out[i] = i < pad ? T{} : in[i - pad];
    }
  }
}

// The other ops give a block a chunk of positions. Rows are moved by groups of 2^lane_bits
// threads of a warp, a group a row at a time; RowShape says how.
struct RowShape {
  int64_t elems;  // row_bytes / sizeof(T)
  int lane_bits;
};

// out row i = in row source(i), zeros where that is negative, for i in [0, count).
template <typename T, typename Source>
__device__ void MoveRows(const RowShape& shape, const T* __restrict__ in, T* __restrict__ out,
                         int count, Source source) {
  const int lanes = 1 << shape.lane_bits;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int step = kThreads >> shape.lane_bits;
  for (int i = static_cast<int>(threadIdx.x) >> shape.lane_bits; i < count; i += kBatch * step) {
    int64_t from[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) from[k] = i + k * step < count ? source(i + k * step) : -1;
    for (int64_t e = lane; e < shape.elems; e += lanes) {
      T v[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) v[k] = from[k] < 0 ? T{} : in[from[k] * shape.elems + e];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (i + k * step < count) out[(i + k * step) * shape.elems + e] = v[k];
      }
    }
  }
}

// The sum of `value` over the block, given to all threads. `scratch` [kWarps] is shared.
__device__ int BlockSum(int value, int* scratch) {
  value = __reduce_add_sync(0xffffffffu, value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += scratch[w];
  return sum;
}

// A thread's share of the bytes of p [n] that are not zero.
__device__ int CountSet(const uint8_t* p, int n) {
  const int head = min(n, static_cast<int>(-reinterpret_cast<intptr_t>(p) & 15));
  const int tail = head + (n - head) / 16 * 16;
  int count = 0;
  for (int i = static_cast<int>(threadIdx.x); i < head; i += kThreads) count += p[i] != 0;
  for (int i = tail + static_cast<int>(threadIdx.x); i < n; i += kThreads) count += p[i] != 0;
  const uint4* words = reinterpret_cast<const uint4*>(p + head);
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < (tail - head) / 16; i += kThreads) {
    const uint4 w = words[i];
    count += 16 - (__popc(__vcmpeq4(w.x, 0)) + __popc(__vcmpeq4(w.y, 0)) +
                   __popc(__vcmpeq4(w.z, 0)) + __popc(__vcmpeq4(w.w, 0))) /
                      8;
  }
  return count;
}

// Of the positions of mask [seq] that are set: how many before the chunk, in it, in all; and
// the chunk's, ascending, in `list` [kChunk], shared memory.
struct ChunkRank {
  int before, count, total;
};
template <int kChunk>
__device__ ChunkRank RankChunk(const uint8_t* mask, int seq, int begin, uint16_t* list) {
  __shared__ int scratch[kWarps];
  ChunkRank rank;
  rank.before = BlockSum(CountSet(mask, begin), scratch);
  const int in_chunk = min(kChunk, seq - begin);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  rank.count = 0;
  for (int i = 0; i < in_chunk; i += kThreads) {
    const int at = i + static_cast<int>(threadIdx.x);
    const bool set = at < in_chunk && mask[begin + at] != 0;
    const uint32_t ballot = __ballot_sync(0xffffffffu, set);
    __syncthreads();
    if (lane == 0) scratch[warp] = __popc(ballot);
    __syncthreads();
    int place = rank.count + __popc(ballot & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += scratch[w];
      rank.count += scratch[w];
    }
    if (set) list[place] = static_cast<uint16_t>(at);
  }
  const int end = begin + in_chunk;
  rank.total = rank.before + rank.count + BlockSum(CountSet(mask + end, seq - end), scratch);
  return rank;  // BlockSum() has synchronized: `list` is whole
}

// Grid (chunks of `seq`, planes), block kThreads; planes beyond gridDim.y in turns.
template <typename T, int kChunk>
__global__ void __launch_bounds__(kThreads)
    BoolGatherLeftPadKernel(const BoolGatherLeftPadParams p, RowShape shape) {
  __shared__ uint16_t list[kChunk];
  const int begin = static_cast<int>(blockIdx.x) * kChunk;
  const int end = min(p.seq, begin + kChunk);
  const int heads = max(p.num_heads, 1);  // without heads there are indices all the same
  const int64_t planes = static_cast<int64_t>(p.batch) * heads;
  for (int64_t n = blockIdx.y; n < planes; n += gridDim.y) {
    const int64_t b = n / heads;
    const ChunkRank rank = RankChunk<kChunk>(p.mask + b * p.seq, p.seq, begin, list);
    const T* in = static_cast<const T*>(p.in) + (n * p.seq + begin) * shape.elems;
    T* out = static_cast<T*>(p.out) + n * p.seq * shape.elems;
    const int pad = p.seq - rank.total;
    if (p.num_heads > 0) {
      MoveRows(shape, in, out + begin * shape.elems, min(end, pad) - begin, [](int) { return -1; });
      MoveRows(shape, in, out + (pad + rank.before) * shape.elems, rank.count,
               [&](int i) { return int{list[i]}; });
    }
    if (n % heads == 0) {
      int32_t* idx = p.idx + b * p.seq;
      const int thread = static_cast<int>(threadIdx.x);
      for (int i = thread; i < rank.count; i += kThreads) idx[rank.before + i] = begin + list[i];
      for (int i = max(begin, rank.total) + thread; i < end; i += kThreads) idx[i] = -1;
      if (begin == 0 && thread == 0) p.counts[b] = rank.total;
    }
    __syncthreads();  // before the next plane's list
  }
}

// As above.
template <typename T, int kChunk>
__global__ void __launch_bounds__(kThreads)
    CompactByBoolKernel(const CompactByBoolParams p, RowShape shape) {
  __shared__ uint16_t list[kChunk];
  const int begin = static_cast<int>(blockIdx.x) * kChunk;
  const int end = min(p.seq, begin + kChunk);
  for (int64_t n = blockIdx.y; n < p.num_rows; n += gridDim.y) {
    const ChunkRank rank = RankChunk<kChunk>(p.mask + n * p.seq, p.seq, begin, list);
    const T* in = static_cast<const T*>(p.in) + n * p.seq * shape.elems;
    T* out = static_cast<T*>(p.out) + n * p.seq * shape.elems;
    MoveRows(shape, in, out + rank.before * shape.elems, rank.count,
             [&](int i) { return begin + list[i]; });
    const int rest = max(begin, rank.total);
    MoveRows(shape, in, out + rest * shape.elems, end - rest, [&](int i) { return rest + i; });
    if (begin == 0 && threadIdx.x == 0) p.counts[n] = rank.total;
    __syncthreads();  // before the next row's list
  }
}

// Grid (chunks of `out_seq`, batch), block kThreads; a block looks for its rows in all indices.
template <typename T, int kChunk>
__global__ void __launch_bounds__(kThreads)
    ScatterByIndexKernel(const ScatterByIndexParams p, RowShape shape) {
  __shared__ int from[kChunk];  // row of `in` for each row of the chunk
  const int begin = static_cast<int>(blockIdx.x) * kChunk;
  const int rows = min(kChunk, p.out_seq - begin);
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int len = min(max(p.lens[b], 0), min(p.max_len, p.in_seq));
    for (int i = static_cast<int>(threadIdx.x); i < kChunk; i += kThreads) from[i] = -1;
    __syncthreads();
    const int32_t* idx = p.idx + b * p.max_len;
#pragma unroll 8
    for (int j = static_cast<int>(threadIdx.x); j < len; j += kThreads) {
      const int at = idx[j] - begin;
      if (idx[j] >= begin && at < rows) from[at] = p.in_seq - len + j;
    }
    __syncthreads();
    MoveRows(shape, static_cast<const T*>(p.in) + b * p.in_seq * shape.elems,
             static_cast<T*>(p.out) + (b * p.out_seq + begin) * shape.elems, rows,
             [&](int i) { return from[i]; });
    __syncthreads();
  }
}

// Both pointers and row_bytes are multiples of `bytes`.
bool Aligned(const void* in, const void* out, size_t row_bytes, size_t bytes) {
  return (reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out) | row_bytes) % bytes ==
         0;
}

// Calls launch(T{}) with the widest type that fits, then reports on the launch.
template <typename Launch>
absl::Status WithElement(const void* in, const void* out, size_t row_bytes, Launch launch) {
  if (Aligned(in, out, row_bytes, sizeof(uint4))) {
    launch(uint4{});
  } else if (Aligned(in, out, row_bytes, sizeof(uint32_t))) {
    launch(uint32_t{});
  } else {
    launch(uint8_t{});
  }
  return CudaStatus(cudaGetLastError());
}

template <typename T>
RowShape ShapeOf(size_t row_bytes) {
  RowShape shape{.elems = static_cast<int64_t>(row_bytes / sizeof(T)), .lane_bits = 0};
  while (shape.lane_bits < 5 && (int64_t{1} << shape.lane_bits) < shape.elems) ++shape.lane_bits;
  return shape;
}

// A block of a chunked kernel looks at a whole row of mask or indices, so narrow rows take
// longer chunks.
constexpr int kShortChunk = 256, kLongChunk = 2048;
constexpr size_t kNarrowBytes = 32;

dim3 GridOf(int64_t columns, int64_t per_block, int64_t rows) {
  return dim3(static_cast<unsigned>((columns + per_block - 1) / per_block),
              static_cast<unsigned>(std::min<int64_t>(rows, kMaxGridRows)));
}

}  // namespace

absl::Status LaunchLeftPad2d(const LeftPad2dParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateLeftPad2d(p));
  if (p.num_rows == 0 || p.seq == 0) return absl::OkStatus();
  return WithElement(p.in, p.out, p.row_bytes, [&](auto element) {
    using T = decltype(element);
    const int64_t row_elems = static_cast<int64_t>(p.row_bytes / sizeof(T));
    const int64_t pieces = (p.seq * row_elems + kThreads - 1) / kThreads;
    const dim3 grid = GridOf(std::min<int64_t>(pieces, 1 << 20), 1, p.num_rows);
    LeftPad2dKernel<T><<<grid, kThreads, 0, stream>>>(p, row_elems);
  });
}

absl::Status LaunchScatterByIndex(const ScatterByIndexParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateScatterByIndex(p));
  if (p.batch == 0 || p.out_seq == 0) return absl::OkStatus();
  return WithElement(p.in, p.out, p.row_bytes, [&](auto element) {
    using T = decltype(element);
    const RowShape shape = ShapeOf<T>(p.row_bytes);
    if (p.row_bytes <= kNarrowBytes) {
      ScatterByIndexKernel<T, kLongChunk>
          <<<GridOf(p.out_seq, kLongChunk, p.batch), kThreads, 0, stream>>>(p, shape);
    } else {
      ScatterByIndexKernel<T, kShortChunk>
          <<<GridOf(p.out_seq, kShortChunk, p.batch), kThreads, 0, stream>>>(p, shape);
    }
  });
}

absl::Status LaunchBoolGatherLeftPad(const BoolGatherLeftPadParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateBoolGatherLeftPad(p));
  if (p.batch == 0) return absl::OkStatus();
  const size_t counts_bytes = static_cast<size_t>(p.batch) * sizeof(int32_t);
  if (p.seq == 0) return CudaStatus(cudaMemsetAsync(p.counts, 0, counts_bytes, stream));
  const int64_t planes = static_cast<int64_t>(p.batch) * std::max(p.num_heads, 1);
  return WithElement(p.in, p.out, p.row_bytes, [&](auto element) {
    using T = decltype(element);
    const RowShape shape = ShapeOf<T>(p.row_bytes);
    if (p.row_bytes <= kNarrowBytes) {
      BoolGatherLeftPadKernel<T, kLongChunk>
          <<<GridOf(p.seq, kLongChunk, planes), kThreads, 0, stream>>>(p, shape);
    } else {
      BoolGatherLeftPadKernel<T, kShortChunk>
          <<<GridOf(p.seq, kShortChunk, planes), kThreads, 0, stream>>>(p, shape);
    }
  });
}

absl::Status LaunchCompactByBool(const CompactByBoolParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateCompactByBool(p));
  if (p.num_rows == 0) return absl::OkStatus();
  const size_t counts_bytes = static_cast<size_t>(p.num_rows) * sizeof(int32_t);
  if (p.seq == 0) return CudaStatus(cudaMemsetAsync(p.counts, 0, counts_bytes, stream));
  return WithElement(p.in, p.out, p.row_bytes, [&](auto element) {
    using T = decltype(element);
    const RowShape shape = ShapeOf<T>(p.row_bytes);
    if (p.row_bytes <= kNarrowBytes) {
      CompactByBoolKernel<T, kLongChunk>
          <<<GridOf(p.seq, kLongChunk, p.num_rows), kThreads, 0, stream>>>(p, shape);
    } else {
      CompactByBoolKernel<T, kShortChunk>
          <<<GridOf(p.seq, kShortChunk, p.num_rows), kThreads, 0, stream>>>(p, shape);
    }
  });
}

}  // namespace winnow::kernels
