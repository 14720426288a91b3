#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/tensor/tensor_view.h"

namespace winnow {

// The format: u64 header length (little-endian), a JSON object
//   {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
// and the data, to which the offsets refer. Tensors cover the data without gap or
// overlap. "__metadata__" is skipped.
inline constexpr size_t kMaxSafetensorsHeaderBytes = size_t{32} << 20;

using TensorMap = std::map<std::string, TensorView, std::less<>>;

// Checks a whole file's bytes and returns views into them. INVALID_ARGUMENT, naming
// the tensor and field, for anything but the above; reads nothing out of bounds.
absl::StatusOr<TensorMap> ParseSafetensors(absl::Span<const uint8_t> file);

// The tensors of one or several mapped files. Immutable; any thread may read it.
class TensorFiles {
 public:
  // NOT_FOUND if `path` does not exist; INVALID_ARGUMENT, naming the file, if malformed.
  static absl::StatusOr<std::unique_ptr<TensorFiles>> OpenFile(const std::string& path);
  // A model's directory: model.safetensors, or the files that
  // model.safetensors.index.json names. NOT_FOUND if there is neither.
  static absl::StatusOr<std::unique_ptr<TensorFiles>> OpenModel(const std::string& dir);
  ~TensorFiles();
  TensorFiles(const TensorFiles&) = delete;
  TensorFiles& operator=(const TensorFiles&) = delete;

  // Null if there is none of that name.
  const TensorView* Find(std::string_view name) const;
  const TensorMap& tensors() const { return tensors_; }

 private:
  TensorFiles() = default;
  absl::Status Map(const std::string& path, TensorMap* tensors);
  absl::Status MapShards(const std::string& dir, const std::string& index_path);

  struct Mapping {
    void* data = nullptr;
    size_t bytes = 0;
  };
  std::vector<Mapping> mappings_;
  TensorMap tensors_;
};

}  // namespace winnow
