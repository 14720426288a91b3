#pragma once

#include <cstddef>
#include <optional>

#include "common/transport/data_plane.h"

namespace winnow {

inline constexpr size_t kMaxChunkBytes = size_t{1} << 20;

// The bytes ride in the control stream, in Chunk messages of at most
// kMaxChunkBytes. Needs nothing but gRPC.
class InlinePlane final : public DataPlane {
 public:
  // `chunk_bytes` in [1, kMaxChunkBytes]: most bytes of a chunk sent.
  explicit InlinePlane(size_t chunk_bytes = kMaxChunkBytes);

  void StartSend(const v1::Grant& grant, absl::Span<const uint8_t> segment) override;
  std::optional<v1::Chunk> NextChunk() override;
  bool sent() const override { return offset_ == source_.size(); }
  void StartReceive(const v1::Grant& grant, absl::Span<uint8_t> segment) override;
  absl::Status OnChunk(const v1::Chunk& chunk) override;
  bool received() const override { return offset_ == destination_.size(); }

 private:
  const size_t chunk_bytes_;
  v1::Grant grant_;
  absl::Span<const uint8_t> source_;  // sender
  absl::Span<uint8_t> destination_;   // receiver
  size_t offset_ = 0;                 // bytes of the segment that have passed
};

}  // namespace winnow
