#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/compact_decode_shared.cuh"
#include "kernels/cuda/ptx_cluster.cuh"

// How the blocks of a cluster merge a span that they share: each head has a block, into whose
// shared memory all of them store their pieces' results of that head.
namespace winnow::kernels::device {

// Results that a block has room for: of so many heads' pieces.
constexpr int GatherSlots(int heads, int cluster) {
  const int pieces = cluster * kMaxSharePages / kPagesPerUnit;
  return cluster < 2 ? 0
                     : (heads + cluster - 1) / cluster *
                           (pieces < kMaxSharedPieces ? pieces : kMaxSharedPieces);
}
template <int kDim>
constexpr size_t GatherBytes(int slots) {
  return static_cast<size_t>(slots) * (kDim * sizeof(float) + sizeof(float2));
}

#if WINNOW_SM90A

// The merging warps' view of a span that its cluster shares. Of the `num_active` blocks that have
// pieces, block r merges heads r, r + num_active, ...
template <int kDim, int kHeads>
class SpanGather {
 public:
  // `memory` is where GatherBytes() lie in every block, `full` a barrier of one arrival.
  __device__ __forceinline__ SpanGather(uint8_t* memory, int slots, uint64_t* full, int group,
                                        int num_pieces)
      : out_(reinterpret_cast<float*>(memory)),
        norm_(reinterpret_cast<float2*>(out_ + slots * kDim)),
        full_(full),
        num_pieces_(num_pieces) {
    rank_ = ptx::ClusterRank();
    num_active_ = min(ptx::ClusterSize(), num_pieces);
    num_own_ = rank_ < group ? (group - rank_ + num_active_ - 1) / num_active_ : 0;
  }

  // Says how much will come here. One thread.
  __device__ __forceinline__ void Expect() const {
    if (num_own_ == 0) return;
    ptx::BarrierArriveExpect(full_, static_cast<uint32_t>(num_own_ * num_pieces_ *
                                                          (kDim * sizeof(float) + sizeof(float2))));
  }

  // Where a lane's four channels of a head go, those of the first piece.
  struct Target {
    uint32_t out = 0, norm = 0, full = 0;
  };
  __device__ __forceinline__ Target Aim(int head, int channel) const {
    const int slot = head / num_active_ * num_pieces_, block = head % num_active_;
    return {ptx::AddressIn(out_ + slot * kDim + channel, block),
            ptx::AddressIn(norm_ + slot, block), ptx::AddressIn(full_, block)};
  }

  // Stores them of a piece and, with the head's first ones, the rest.
  static __device__ __forceinline__ void Put(const Target& to, int piece, bool is_first,
                                             const float4& x, float max, float sum) {
    ptx::StoreAsync(to.out + piece * kDim * static_cast<int>(sizeof(float)), x, to.full);
    if (is_first) {
      ptx::StoreAsync(to.norm + piece * static_cast<int>(sizeof(float2)), make_float2(max, sum),
                      to.full);
    }
  }

  // Calls store(head, channel, fold, valid) with the sum of each own head's pieces, whole warps
  // at a time. Lane `tid` of kThreads.
  template <typename Fold, int kThreads, typename Store>
  __device__ __forceinline__ void Merge(int tid, Store store) const {
    constexpr int kLanes = kDim / 4, kAtOnce = kThreads / kLanes;
    if (num_own_ == 0) return;
    const int channel = tid % kLanes * 4;
    Wait();
    for (int first = 0; first < num_own_; first += kAtOnce) {
      const int own = min(first + tid / kLanes, num_own_ - 1);
      Fold fold;
#pragma unroll 4
      for (int piece = 0; piece < num_pieces_; ++piece) {
        const int slot = own * num_pieces_ + piece;
        const float2 norm = norm_[slot];
        fold.Add(norm.x, norm.y, *reinterpret_cast<const float4*>(out_ + slot * kDim + channel));
      }
      store(rank_ + own * num_active_, channel, fold, first + tid / kLanes < num_own_);
    }
  }

 private:
  // ptx::BarrierWaitCluster() for the first phase: its parity as an operand costs registers.
  __device__ __forceinline__ void Wait() const {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@done bra ready;\nbra again;\nready:\n}\n" ::"r"(ptx::SharedAddress(full_))
        : "memory");
  }

  float* out_;    // [own heads, num_pieces, kDim]
  float2* norm_;  // [own heads, num_pieces]
  uint64_t* full_;
  int num_pieces_, rank_, num_active_, num_own_;
};

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::device
