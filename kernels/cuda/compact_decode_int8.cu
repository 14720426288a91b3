#include "kernels/cuda/compact_decode_attention.cuh"

namespace winnow::kernels::device {

template absl::Status LaunchCompactDecode<KvElement::kInt8, KvElement::kInt8, 64>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);
template absl::Status LaunchCompactDecode<KvElement::kInt8, KvElement::kInt8, 128>(
    const CompactDecodeArgs&, const DecodeLaunch&, cudaStream_t);

}  // namespace winnow::kernels::device
