#include "common/transport/inline_plane.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "kernels/kv_pack.h"

namespace winnow {

InlinePlane::InlinePlane(size_t chunk_bytes) : chunk_bytes_(chunk_bytes) {
  WINNOW_CHECK(chunk_bytes >= 1 && chunk_bytes <= kMaxChunkBytes);
}

void InlinePlane::StartSend(const v1::Grant& grant, absl::Span<const uint8_t> segment) {
  grant_ = grant;
  source_ = segment;
  offset_ = 0;
}

std::optional<v1::Chunk> InlinePlane::NextChunk() {
  if (offset_ == source_.size()) return std::nullopt;
  const absl::Span<const uint8_t> data = source_.subspan(offset_, chunk_bytes_);
  v1::Chunk chunk;
  chunk.set_slot(grant_.slot());
  chunk.set_generation(grant_.generation());
  chunk.set_offset(offset_);
  chunk.set_data(data.data(), data.size());
  chunk.set_crc32c(kernels::Crc32c(data.data(), data.size()));
  offset_ += data.size();
  return chunk;
}

void InlinePlane::StartReceive(const v1::Grant& grant, absl::Span<uint8_t> segment) {
  grant_ = grant;
  destination_ = segment;
  offset_ = 0;
}

absl::Status InlinePlane::OnChunk(const v1::Chunk& chunk) {
  const std::string& data = chunk.data();
  if (chunk.slot() != grant_.slot() || chunk.generation() != grant_.generation()) {
    return absl::FailedPreconditionError(
        absl::StrCat("chunk of slot ", chunk.slot(), " generation ", chunk.generation(),
                     ": granted is slot ", grant_.slot(), " generation ", grant_.generation()));
  }
  if (data.empty() || data.size() > kMaxChunkBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk of ", data.size(), " bytes is outside [1, ", kMaxChunkBytes, "]"));
  }
  if (chunk.offset() != offset_) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk offset=", chunk.offset(), ", expected ", offset_));
  }
  if (data.size() > destination_.size() - offset_) {
    return absl::InvalidArgumentError(absl::StrCat("chunk of ", data.size(), " bytes at ", offset_,
                                                   " passes the segment's ", destination_.size()));
  }
  const uint32_t crc = kernels::Crc32c(data.data(), data.size());
  if (crc != chunk.crc32c()) {
    return absl::DataLossError(
        absl::StrCat("chunk at ", offset_, ": crc32c is ", crc, ", announced ", chunk.crc32c()));
  }
  std::memcpy(destination_.data() + offset_, data.data(), data.size());
  offset_ += data.size();
  return absl::OkStatus();
}

}  // namespace winnow
