#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/crc32c.h"

// A CRC is the remainder of the message, as a polynomial over GF(2), times x^32. Words are
// little-endian and polynomials reflected: bit 31 of a word is the coefficient of x^0. So
//   crc = x^32 sum_i word_i x^(32 (n - 1 - i)),
// a sum that may be cut anywhere. A block sums 1024 interleaved streams of words, thread t words
// 4 t to 4 t + 3 of every 1024, each stream by
//   s = s x^32768 + word.
// Multiplication by a constant is linear: the product is the sum of the products of the factor's
// 5-bit digits, whose 32 values lie across the lanes of a warp, so a shuffle is a table look-up
// without bank conflicts. A warp then folds the 1024 words in the same manner, and the block's sum
// is moved to its place by a power of x and added to the range's with one atomic exclusive or.
// Words past the end count as zeros, which a negative power takes away again.
namespace winnow::kernels {
namespace {

constexpr int kThreads = 256, kLanes = 32;
constexpr int kStreams = 4 * kThreads;                  // words of 32 bits
constexpr int kRounds = 16;                             // of a block: 64 KiB
constexpr int64_t kPart = int64_t{kRounds} * kThreads;  // in 16 bytes
constexpr int kBatch = 4;                               // loads in flight
constexpr uint32_t kPolynomial = 0x82f63b78u;
constexpr uint32_t kOne = 0x80000000u;
constexpr int kDigits = 7;  // of 5 bits

__host__ __device__ constexpr uint32_t TimesX(uint32_t a) {
  return (a >> 1) ^ ((a & 1) != 0 ? kPolynomial : 0);
}
__host__ __device__ constexpr uint32_t DividedByX(uint32_t a) {
  return (a & kOne) != 0 ? (a ^ kPolynomial) << 1 | 1 : a << 1;
}
__host__ __device__ constexpr uint32_t Multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int i = 0; i < 32; ++i) {
    product ^= (a & kOne) != 0 ? b : 0;
    a <<= 1;
    b = TimesX(b);
  }
  return product;
}

constexpr uint32_t PowerOfX(int exponent) {
  uint32_t power = kOne, square = kOne >> 1;
  for (; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) != 0) power = Multiply(power, square);
    square = Multiply(square, square);
  }
  return power;
}

struct Tables {
  uint32_t by_stream[kDigits][kLanes];  // digit times x^(32 kStreams)
  uint32_t by_warp[kDigits][kLanes];    // digit times x^(32 * 32)
  uint32_t lane[kLanes];                // x^(32 (32 - lane))
  uint32_t up[kLanes], down[kLanes];    // x^(8 * 2^i) and its inverse
};

constexpr Tables MakeTables() {
  Tables t{};
  const uint32_t stream = PowerOfX(32 * kStreams), warp = PowerOfX(32 * kLanes);
  for (int d = 0; d < kDigits; ++d) {
    for (int v = 0; v < kLanes; ++v) {
      const uint32_t digit = static_cast<uint32_t>(v) << (5 * d);
      t.by_stream[d][v] = Multiply(digit, stream);
      t.by_warp[d][v] = Multiply(digit, warp);
    }
  }
  for (int l = 0; l < kLanes; ++l) t.lane[l] = PowerOfX(32 * (kLanes - l));
  t.up[0] = PowerOfX(8);
  t.down[0] = kOne;
  for (int i = 0; i < 8; ++i) t.down[0] = DividedByX(t.down[0]);
  for (int i = 1; i < kLanes; ++i) {
    t.up[i] = Multiply(t.up[i - 1], t.up[i - 1]);
    t.down[i] = Multiply(t.down[i - 1], t.down[i - 1]);
  }
  return t;
}

__device__ const Tables kTables = MakeTables();

// The digits' products that this lane holds.
struct Factor {
  uint32_t digit[kDigits];

  __device__ explicit Factor(const uint32_t (&table)[kDigits][kLanes]) {
#pragma unroll
    for (int d = 0; d < kDigits; ++d) digit[d] = table[d][threadIdx.x % kLanes];
  }
  __device__ __forceinline__ uint32_t Times(uint32_t a) const {
    uint32_t product = 0;
#pragma unroll
    for (int d = 0; d < kDigits; ++d) {
      product ^= __shfl_sync(0xffffffffu, digit[d], static_cast<int>(a >> (5 * d)));
    }
    return product;
  }
};

// x^(8 bytes), |bytes| < 2^32, by the lanes of a warp.
__device__ uint32_t Shift(int64_t bytes) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const uint64_t size = static_cast<uint64_t>(bytes < 0 ? -bytes : bytes);
  uint32_t power = kOne;
  if ((size >> lane & 1) != 0) power = bytes < 0 ? kTables.down[lane] : kTables.up[lane];
  for (int step = kLanes / 2; step > 0; step /= 2) {
    power = Multiply(power, __shfl_xor_sync(0xffffffffu, power, step));
  }
  return power;
}

// The 16 bytes at p, without those outside [begin, end).
__device__ __forceinline__ uint4 LoadWithin(const uint8_t* p, const uint8_t* begin,
                                            const uint8_t* end) {
  if (p >= begin && p + 16 <= end) return *reinterpret_cast<const uint4*>(p);
  uint32_t words[4] = {};
  for (int i = 0; i < 16; ++i) {
    if (p + i >= begin && p + i < end) words[i / 4] |= uint32_t{p[i]} << (8 * (i % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Grid (blocks of a range, ranges), block kThreads. `crc` holds zeros.
__global__ void __launch_bounds__(kThreads)
    Crc32cKernel(const uint8_t* data, const ByteRange* ranges, uint32_t* crc) {
  __shared__ uint32_t streams[kStreams];
  const ByteRange range = ranges[blockIdx.y];
  if (range.offset < 0 || range.bytes <= 0) return;
  const uint8_t* begin = data + range.offset;
  const uint8_t* end = begin + range.bytes;
  // Zeros before the message change nothing.
  const uint8_t* aligned = begin - (reinterpret_cast<uintptr_t>(begin) & 15);
  const int64_t size = (end - aligned + 15) / 16;
  const Factor by_stream(kTables.by_stream);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = blockIdx.x * kPart; first < size; first += gridDim.x * kPart) {
    const int rounds = static_cast<int>((min(kPart, size - first) + kThreads - 1) / kThreads);
    uint32_t s[4] = {};
    for (int round = 0; round < rounds; round += kBatch) {
      uint4 v[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int64_t at = first + (round + k) * kThreads + thread;
        v[k] = make_uint4(0, 0, 0, 0);
        if (round + k < rounds && at < size) v[k] = LoadWithin(aligned + at * 16, begin, end);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (round + k >= rounds) break;
        s[0] = by_stream.Times(s[0]) ^ v[k].x;
        s[1] = by_stream.Times(s[1]) ^ v[k].y;
        s[2] = by_stream.Times(s[2]) ^ v[k].z;
        s[3] = by_stream.Times(s[3]) ^ v[k].w;
      }
    }
    *reinterpret_cast<uint4*>(&streams[4 * thread]) = make_uint4(s[0], s[1], s[2], s[3]);
    __syncthreads();
    if (thread < kLanes) {
      const Factor by_warp(kTables.by_warp);
      uint32_t sum = 0;
#pragma unroll 4
      for (int i = 0; i < kStreams; i += kLanes) sum = by_warp.Times(sum) ^ streams[i + thread];
      sum = __reduce_xor_sync(0xffffffffu, Multiply(sum, kTables.lane[thread]));
      sum = Multiply(sum, Shift(end - (aligned + 16 * (first + rounds * kThreads))));
      // What the first block adds: the register starts as ones and is inverted at the end.
      if (first == 0) sum ^= Multiply(~0u, Shift(range.bytes)) ^ ~0u;
      if (thread == 0) atomicXor(&crc[blockIdx.y], sum);
    }
    __syncthreads();
  }
}

}  // namespace

absl::Status ValidateCrc32cCuda(const Crc32cCudaParams& p) {
  if (p.data == nullptr || p.ranges == nullptr || p.crc == nullptr) {
    return absl::InvalidArgumentError("crc32c: data, ranges or crc is null");
  }
  if (p.num_ranges < 0 || p.num_ranges > 65535 || p.max_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("crc32c: bad size num_ranges=", p.num_ranges, " max_bytes=", p.max_bytes));
  }
  return absl::OkStatus();
}

absl::Status LaunchCrc32c(const Crc32cCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateCrc32cCuda(p));
  if (p.num_ranges == 0) return absl::OkStatus();
  WINNOW_RETURN_IF_ERROR(CudaStatus(
      cudaMemsetAsync(p.crc, 0, static_cast<size_t>(p.num_ranges) * sizeof(uint32_t), stream)));
  const int64_t blocks = std::clamp<int64_t>(p.max_bytes / (16 * kPart) + 1, 1, 512);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.num_ranges));
  Crc32cKernel<<<grid, kThreads, 0, stream>>>(p.data, p.ranges, p.crc);
  return CudaStatus(cudaGetLastError());
}

}  // namespace winnow::kernels
