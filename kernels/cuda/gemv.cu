#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/gemv.h"
#include "kernels/cuda/gemv_sm90.h"
#include "kernels/cuda/gemv_store.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma_sync.cuh"
#include "kernels/cuda/ptx.cuh"

namespace winnow::kernels {
namespace {

constexpr int kPortableWarps = 8;
constexpr int kTileRows = 16;  // of w

// The lower / upper two e4m3 codes of `w` as two BF16, exact (0x7f and 0xff, never stored, are
// +-480): as a BF16 the same sign, exponent and mantissa bits are worth 2^-120 of it.
template <int kHalf>
__device__ __forceinline__ uint32_t E4m3PairToBf16(uint32_t w) {
  const uint32_t x = __byte_perm(w, 0, kHalf == 0 ? 0x1404 : 0x3424);
  const uint32_t bits = (x & 0x80008000u) | ((x >> 4) & 0x07f007f0u);
  constexpr uint32_t kTwoTo120 = 0x7b807b80u;
  __nv_bfloat162 value, factor;
  memcpy(&value, &bits, 4);
  memcpy(&factor, &kTwoTo120, 4);
  value = __hmul2(value, factor);
  uint32_t out;
  memcpy(&out, &value, 4);
  return out;
}

// Row of w behind row `r` of a tile, -1 past the end. kSiluMul pairs eight gate rows with the
// eight up rows of the same columns.
__device__ __forceinline__ int GemvRow(const GemvParams& p, int tile, int r) {
  if (p.epilogue == GemvEpilogue::kSiluMul) {
    const int column = 8 * tile + r % 8;
    return column < p.n / 2 ? column + (r < 8 ? 0 : p.n / 2) : -1;
  }
  const int row = kTileRows * tile + r;
  return row < p.n ? row : -1;
}

// Four consecutive rows of a tile: what the epilogue reads besides the sums.
struct GemvQuad {
  float scale[4], old[4];
};
__device__ __forceinline__ void LoadScales(const GemvParams& p, int tile, int quad, GemvQuad* q) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = GemvRow(p, tile, 4 * quad + j);
    q->scale[j] = p.w_scale != nullptr && row >= 0 ? p.w_scale[row] : 1.0f;
  }
}
__device__ __forceinline__ void LoadOld(const GemvParams& p, int tile, int m, int quad,
                                        GemvQuad* q) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = GemvRow(p, tile, 4 * quad + j);
    q->old[j] = p.epilogue == GemvEpilogue::kAdd && row >= 0 ? p.out_f32[m * p.ldo + row] : 0.0f;
  }
}

// Writes the quad's outputs; the lanes of a warp hold quads (lane % 4) of rows lane / 4 of x, and
// all get here. `store`: the lane's row of x exists.
__device__ __forceinline__ void FinishGemvQuad(const GemvParams& p, int tile, int m, int quad,
                                               const GemvQuad& q, float (&y)[4], bool store) {
#pragma unroll
  for (int j = 0; j < 4; ++j) y[j] *= q.scale[j];
  if (p.epilogue == GemvEpilogue::kAdd) {
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = q.old[j] + y[j];
  }
  if (p.epilogue == GemvEpilogue::kSiluMul) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float up = __shfl_down_sync(0xffffffffu, y[j], 2);
      y[j] = internal::GemvSilu(y[j], up);
    }
    store = store && quad < 2;
  }
  if (!store) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = GemvRow(p, tile, 4 * quad + j);
    if (row < 0) continue;
    internal::StoreGemv(p, m * p.ldo + row, y[j]);
  }
}

// The portable kernel: a block a tile of 16 rows of w, the A operand of mma.m16n8k16, whose columns
// are the rows of x. Its warps share a row by steps of 64 bytes, their sums are added in order.
// k is permuted alike in both operands: a lane's fragments are 16 bytes that lie together.
template <bool kE4m3, int kTiles>
__global__ void __launch_bounds__(32 * kPortableWarps) PortableKernel(const GemvParams p) {
  __shared__ float4 warp_sums[kPortableWarps][32 * kTiles];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4, tile = static_cast<int>(blockIdx.x);
  const int row_bytes = p.k * (kE4m3 ? 1 : 2);
  const auto load = [](const uint8_t* row, int64_t at, bool inside) {
    return inside ? *reinterpret_cast<const uint4*>(row + at) : uint4{};
  };
  const int rows[2] = {GemvRow(p, tile, g), GemvRow(p, tile, g + 8)};
  const uint8_t* w[2];
  for (int i = 0; i < 2; ++i) {
    w[i] = static_cast<const uint8_t*>(p.w) + int64_t{max(rows[i], 0)} * row_bytes;
  }
  float sums[kTiles][4] = {};
  for (int start = 64 * warp; start < row_bytes; start += 64 * kPortableWarps) {
    const int at = start + 16 * t;
    const bool inside = at < row_bytes;
    const uint4 lo = load(w[0], at, inside && rows[0] >= 0);
    const uint4 hi = load(w[1], at, inside && rows[1] >= 0);
    const uint32_t low[4] = {lo.x, lo.y, lo.z, lo.w}, high[4] = {hi.x, hi.y, hi.z, hi.w};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const auto* x = reinterpret_cast<const uint8_t*>(p.x + min(g + 8 * n, p.m - 1) * p.ldx);
      if constexpr (kE4m3) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 b = load(x, 2 * at + 16 * half, inside);
          const uint32_t pairs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t l = low[2 * half + i], h = high[2 * half + i];
            device::MmaBf16(sums[n],
                            make_uint4(E4m3PairToBf16<0>(l), E4m3PairToBf16<0>(h),
                                       E4m3PairToBf16<1>(l), E4m3PairToBf16<1>(h)),
                            pairs[2 * i], pairs[2 * i + 1]);
          }
        }
      } else {
        const uint4 b = load(x, at, inside);
        device::MmaBf16(sums[n], make_uint4(low[0], high[0], low[1], high[1]), b.x, b.y);
        device::MmaBf16(sums[n], make_uint4(low[2], high[2], low[3], high[3]), b.z, b.w);
      }
    }
  }
  // [row of x][row of the tile] of each warp.
  auto* out = reinterpret_cast<float*>(warp_sums[warp]);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float* to = out + (8 * n + 2 * t) * 16 + g;
    to[0] = sums[n][0];
    to[16] = sums[n][1];
    to[8] = sums[n][2];
    to[24] = sums[n][3];
  }
  __syncthreads();
  if (warp >= kTiles) return;
  const int e = static_cast<int>(threadIdx.x), m = e / 4;
  float y[4] = {};
  for (const auto& quads : warp_sums) {
    y[0] += quads[e].x;
    y[1] += quads[e].y;
    y[2] += quads[e].z;
    y[3] += quads[e].w;
  }
  const bool mine = m < p.m;
  GemvQuad extra{};
  LoadScales(p, tile, e % 4, &extra);
  if (mine) LoadOld(p, tile, m, e % 4, &extra);
  FinishGemvQuad(p, tile, m, e % 4, extra, y, mine);
}

template <bool kE4m3>
absl::Status EnqueuePortable(const GemvParams& p, StreamHandle stream) {
  const bool paired = p.epilogue == GemvEpilogue::kSiluMul;
  const unsigned tiles = static_cast<unsigned>(paired ? (p.n / 2 + 7) / 8 : (p.n + 15) / 16);
  if (p.m <= 8) {
    PortableKernel<kE4m3, 1><<<tiles, 32 * kPortableWarps, 0, stream>>>(p);
  } else {
    PortableKernel<kE4m3, 2><<<tiles, 32 * kPortableWarps, 0, stream>>>(p);
  }
  return CudaStatus(cudaGetLastError());
}

absl::Status Invalid(const char* field, int64_t value) {
  return absl::InvalidArgumentError(absl::StrCat("gemv: ", field, "=", value));
}

}  // namespace

absl::Status ValidateGemv(const GemvParams& p) {
  if (p.m < 0 || p.m > kMaxGemvRows) return Invalid("m", p.m);
  if (p.weights > GemvWeights::kE4m3) return Invalid("weights", static_cast<int>(p.weights));
  if (p.epilogue > GemvEpilogue::kSiluMul) return Invalid("epilogue", static_cast<int>(p.epilogue));
  const bool paired = p.epilogue == GemvEpilogue::kSiluMul, e4m3 = p.weights == GemvWeights::kE4m3;
  constexpr int kMost = 1 << 30;  // rows of w are stepped through in 32 bits
  if (p.n < 1 || p.n > kMost || (paired && p.n % 2 != 0)) return Invalid("n", p.n);
  if (p.k < 1 || p.k % (e4m3 ? 16 : 8) != 0) return Invalid("k", p.k);
  if (p.k > kMaxGemvK) return absl::UnimplementedError(absl::StrCat("gemv: k=", p.k));
  if (p.ldx < p.k || p.ldx % 8 != 0) return Invalid("ldx", p.ldx);
  if (p.ldo < (paired ? p.n / 2 : p.n)) return Invalid("ldo", p.ldo);
  if (p.x == nullptr || p.w == nullptr || !Aligned(p.x, 16) || !Aligned(p.w, 16)) {
    return absl::InvalidArgumentError("gemv: x or w is null or not aligned to 16 bytes");
  }
  if ((p.w_scale != nullptr) != e4m3) {
    return absl::InvalidArgumentError("gemv: w_scale belongs to e4m3 weights, and to them alone");
  }
  if ((p.out_f32 != nullptr) == (p.out_bf16 != nullptr)) {
    return absl::InvalidArgumentError("gemv: one of out_f32 and out_bf16 must be set");
  }
  if (p.epilogue == GemvEpilogue::kAdd && p.out_f32 == nullptr) {
    return absl::InvalidArgumentError("gemv: kAdd adds to out_f32");
  }
  return absl::OkStatus();
}

absl::Status LaunchGemv(const GemvParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateGemv(params));
  if (params.m == 0) return absl::OkStatus();
  const bool e4m3 = params.weights == GemvWeights::kE4m3;
  static const bool have_sm90 = internal::HaveGemvSm90Code();
  if (have_sm90 && !params.portable) {
    return e4m3 ? internal::EnqueueGemvSm90E4m3(params, stream)
                : internal::EnqueueGemvSm90Bf16(params, stream);
  }
  return e4m3 ? EnqueuePortable<true>(params, stream) : EnqueuePortable<false>(params, stream);
}

}  // namespace winnow::kernels
