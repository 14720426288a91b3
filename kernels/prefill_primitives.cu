#include <cuda_runtime.h>

#include <algorithm>

#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/prefill_primitives.h"

namespace winnow::kernels {
namespace {

constexpr int kThreads = 256;
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

template <typename T>
void Enqueue(const LeftPad2dParams& params, StreamHandle stream) {
  const int64_t row_elems = static_cast<int64_t>(params.row_bytes / sizeof(T));
  const int64_t pieces = (params.seq * row_elems + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(pieces, 1 << 20)),
                  static_cast<unsigned>(std::min(params.num_rows, kMaxGridRows)));
  LeftPad2dKernel<T><<<grid, kThreads, 0, stream>>>(params, row_elems);
}

// All of in, out and row_bytes are multiples of `bytes`.
bool Aligned(const LeftPad2dParams& params, size_t bytes) {
  return (reinterpret_cast<uintptr_t>(params.in) | reinterpret_cast<uintptr_t>(params.out) |
          params.row_bytes) %
             bytes ==
         0;
}

}  // namespace

absl::Status LaunchLeftPad2d(const LeftPad2dParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateLeftPad2d(params));
  if (params.num_rows == 0 || params.seq == 0) return absl::OkStatus();
  if (Aligned(params, sizeof(uint4))) {
    Enqueue<uint4>(params, stream);
  } else if (Aligned(params, sizeof(uint32_t))) {
    Enqueue<uint32_t>(params, stream);
  } else {
    Enqueue<uint8_t>(params, stream);
  }
  return CudaStatus(cudaGetLastError());
}

}  // namespace winnow::kernels
