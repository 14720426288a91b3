#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul_quantize.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/silu.cuh"
#include "kernels/cuda/vector_io.cuh"

namespace winnow::kernels {
namespace {

constexpr int kThreads = 256;

template <bool kSiluMul>
__device__ __forceinline__ device::Floats<8> Values(const Bf16* row, int j, int k) {
  device::Floats<8> x = device::Load<8>(row + j);
  if constexpr (kSiluMul) {
    const device::Floats<8> up = device::Load<8>(row + k + j);
#pragma unroll
    for (int i = 0; i < 8; ++i) x.v[i] = device::SiluTimes(x.v[i], up.v[i]);
  }
  return x;
}

// Grid: a block a row, which it reads twice, from L1 the second time.
template <bool kSiluMul>
__global__ void __launch_bounds__(kThreads) QuantizeRowsKernel(const QuantizeRowsParams p) {
  __shared__ uint32_t warp_max[kThreads / 32];
  ptx::WaitForPredecessors();
  const Bf16* row = p.x + blockIdx.x * p.ldx;
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t max_bits = 0;  // as integers, NaN and infinity are the largest
  for (int j = 8 * thread; j < p.k; j += 8 * kThreads) {
    const device::Floats<8> x = Values<kSiluMul>(row, j, p.k);
#pragma unroll
    for (int i = 0; i < 8; ++i) max_bits = max(max_bits, __float_as_uint(x.v[i]) & 0x7fffffffu);
  }
  max_bits = __reduce_max_sync(0xffffffffu, max_bits);
  if (thread % 32 == 0) warp_max[thread / 32] = max_bits;
  __syncthreads();
#pragma unroll
  for (const uint32_t other : warp_max) max_bits = max(max_bits, other);
  const bool finite = max_bits < 0x7f800000u;
  const float scale = finite ? __fdiv_rn(fmaxf(__uint_as_float(max_bits), 0x1p-100f), 448.0f)
                             : __uint_as_float(0x7fc00000u);
  if (thread == 0) p.scale[blockIdx.x] = scale;
  for (int j = 8 * thread; j < p.k; j += 8 * kThreads) {
    const device::Floats<8> x = Values<kSiluMul>(row, j, p.k);
    uint32_t codes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto pair = [&](int first) {
        return uint32_t{__nv_cvt_float2_to_fp8x2(
            make_float2(__fdiv_rn(x.v[first], scale), __fdiv_rn(x.v[first + 1], scale)),
            __NV_SATFINITE, __NV_E4M3)};
      };
      codes[i] = finite ? pair(4 * i) | pair(4 * i + 2) << 16 : 0;
    }
    *reinterpret_cast<uint2*>(p.codes + int64_t{blockIdx.x} * p.k + j) =
        make_uint2(codes[0], codes[1]);
  }
}

absl::Status Invalid(const char* field, int64_t value) {
  return absl::InvalidArgumentError(absl::StrCat("quantize_rows: ", field, "=", value));
}

}  // namespace

absl::Status ValidateQuantizeRows(const QuantizeRowsParams& p) {
  if (p.m < 0) return Invalid("m", p.m);
  if (p.k < 8 || p.k % 8 != 0) return Invalid("k", p.k);
  if (p.ldx < int64_t{p.silu_mul ? 2 : 1} * p.k || p.ldx % 8 != 0) return Invalid("ldx", p.ldx);
  if (p.x == nullptr || !Aligned(p.x, 16) || p.codes == nullptr || !Aligned(p.codes, 8) ||
      p.scale == nullptr) {
    return absl::InvalidArgumentError("quantize_rows: x, codes or scale is null or misaligned");
  }
  return absl::OkStatus();
}

absl::Status LaunchQuantizeRows(const QuantizeRowsParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateQuantizeRows(params));
  if (params.m == 0) return absl::OkStatus();
  const dim3 grid(static_cast<unsigned>(params.m));
  return params.silu_mul
             ? LaunchEarly(QuantizeRowsKernel<true>, grid, kThreads, 0, stream, params)
             : LaunchEarly(QuantizeRowsKernel<false>, grid, kThreads, 0, stream, params);
}

}  // namespace winnow::kernels
