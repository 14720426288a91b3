#include "kernels/cuda/compact_decode_attention.cuh"

namespace winnow::kernels::device {

template absl::Status LaunchCompactDecode<KvElement::kInt8, KvElement::kE4m3, 64>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);
template absl::Status LaunchCompactDecode<KvElement::kInt8, KvElement::kE4m3, 128>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);

}  // namespace winnow::kernels::device
