#include "kernels/cuda/compact_decode_attention.cuh"

namespace winnow::kernels::device {

template cudaError_t LaunchCompactDecode<KvElement::kE4m3, KvElement::kE4m3, 64>(
    const CompactDecodeArgs&, int, bool, cudaStream_t);
template cudaError_t LaunchCompactDecode<KvElement::kE4m3, KvElement::kE4m3, 128>(
    const CompactDecodeArgs&, int, bool, cudaStream_t);

}  // namespace winnow::kernels::device
