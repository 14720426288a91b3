#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/gemv.h"
#include "kernels/cuda/gemv_device.cuh"
#include "kernels/cuda/gemv_sm90.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma_sync.cuh"

namespace winnow::kernels {
namespace {

constexpr int kPortableWarps = 8;

// The portable kernel: a block a tile of 16 rows, which its warps share by steps of 64 bytes of
// each row; their sums are added in order. The fragments are those of gemv_bf16_sm90.cuh.
template <bool kE4m3, int kTiles>
__global__ void __launch_bounds__(32 * kPortableWarps) PortableKernel(const GemvParams p) {
  __shared__ float4 warp_sums[kPortableWarps][32 * kTiles];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4, tile = static_cast<int>(blockIdx.x);
  const int row_bytes = p.k * (kE4m3 ? 1 : 2);
  const auto load = [](const uint8_t* row, int64_t at, bool inside) {
    return inside ? *reinterpret_cast<const uint4*>(row + at) : uint4{};
  };
  const int rows[2] = {device::GemvRow(p, tile, g), device::GemvRow(p, tile, g + 8)};
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
                            make_uint4(device::E4m3PairToBf16<0>(l), device::E4m3PairToBf16<0>(h),
                                       device::E4m3PairToBf16<1>(l), device::E4m3PairToBf16<1>(h)),
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
  device::GemvQuad extra{};
  device::LoadScales(p, tile, e % 4, &extra);
  if (mine) device::LoadOld(p, tile, m, e % 4, &extra);
  device::FinishGemvQuad(p, tile, m, e % 4, extra, y, mine);
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
  if (p.n < 1 || (paired && p.n % 2 != 0)) return Invalid("n", p.n);
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
