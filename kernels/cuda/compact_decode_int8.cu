#include "kernels/cuda/compact_decode_attention.cuh"

namespace winnow::kernels::device {

template cudaError_t LaunchCompactDecode<KvElement::kInt8, KvElement::kInt8, 64>(
    const CompactDecodeArgs&, int, bool, cudaStream_t);
template cudaError_t LaunchCompactDecode<KvElement::kInt8, KvElement::kInt8, 128>(
    const CompactDecodeArgs&, int, bool, cudaStream_t);

}  // namespace winnow::kernels::device
