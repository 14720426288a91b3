#include "common/tensor/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tensor/small_file.h"

namespace winnow {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxDims = 8;
constexpr DType kAllDTypes[] = {DType::kBf16, DType::kF16,    DType::kF32,   DType::kF64,
                                DType::kI64,  DType::kU64,    DType::kI32,   DType::kU32,
                                DType::kI16,  DType::kU16,    DType::kI8,    DType::kU8,
                                DType::kBool, DType::kF8E4m3, DType::kF8E5m2};

absl::Status Bad(std::string_view tensor, std::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat("tensor ", std::string(tensor), ": ", std::string(what)));
}

std::optional<DType> FindDType(const std::string& name) {
  for (DType dtype : kAllDTypes) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return std::nullopt;
}

// The header as an object; a name that comes twice is refused, where the library
// would silently keep the last.
absl::StatusOr<Json> ParseHeader(std::string_view text) {
  std::set<std::string> names;
  std::string twice;
  const Json::parser_callback_t note_names = [&](int depth, Json::parse_event_t event,
                                                 Json& value) {
    if (depth == 1 && event == Json::parse_event_t::key) {
      const auto& name = value.get_ref<const std::string&>();
      if (!names.insert(name).second) twice = name;
    }
    return true;
  };
  Json header = Json::parse(text.begin(), text.end(), note_names, /*allow_exceptions=*/false);
  if (header.is_discarded() || !header.is_object()) {
    return absl::InvalidArgumentError("the header is not a JSON object");
  }
  if (!twice.empty()) return Bad(twice, "named twice");
  return header;
}

// An array of non-negative integers.
std::optional<std::vector<int64_t>> Integers(const Json& object, const char* field, size_t max) {
  const auto it = object.find(field);
  if (it == object.end() || !it->is_array() || it->size() > max) return std::nullopt;
  std::vector<int64_t> values;
  for (const Json& value : *it) {
    if (!value.is_number_unsigned()) return std::nullopt;
    const auto number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
    values.push_back(static_cast<int64_t>(number));
  }
  return values;
}

absl::StatusOr<TensorView> ParseTensor(const std::string& name, const Json& entry,
                                       absl::Span<const uint8_t> data) {
  if (!entry.is_object()) return Bad(name, "its entry is not an object");
  const auto dtype_field = entry.find("dtype");
  if (dtype_field == entry.end() || !dtype_field->is_string()) return Bad(name, "dtype is missing");
  const auto& dtype_name = dtype_field->get_ref<const std::string&>();
  const std::optional<DType> dtype = FindDType(dtype_name);
  if (!dtype.has_value()) return Bad(name, absl::StrCat("dtype=", dtype_name, " is unknown"));
  const auto dims = Integers(entry, "shape", kMaxDims);
  if (!dims.has_value()) return Bad(name, "shape is not a list of at most 8 sizes");
  const auto offsets = Integers(entry, "data_offsets", 2);
  if (!offsets.has_value() || offsets->size() != 2) {
    return Bad(name, "data_offsets is not a pair of offsets");
  }
  const auto [begin, end] = std::pair((*offsets)[0], (*offsets)[1]);
  if (begin > end || static_cast<uint64_t>(end) > data.size()) {
    return Bad(name, absl::StrCat("data_offsets=[", begin, ", ", end, "] in ", data.size(),
                                  " bytes of data"));
  }
  int64_t needed = static_cast<int64_t>(DTypeBytes(*dtype));
  for (int64_t dim : *dims) {
    if (__builtin_mul_overflow(needed, dim, &needed)) {
      return Bad(name, absl::StrCat("shape=", DimsString(*dims), " overflows"));
    }
  }
  if (needed != end - begin) {
    return Bad(name, absl::StrCat("shape=", DimsString(*dims), " of ", dtype_name, " takes ",
                                  needed, " bytes, data_offsets span ", end - begin));
  }
  return TensorView{.dtype = *dtype,
                    .dims = *dims,
                    .data = data.data() + begin,
                    .bytes = static_cast<size_t>(end - begin)};
}

absl::Status CheckCover(const TensorMap& tensors, absl::Span<const uint8_t> data) {
  std::vector<TensorMap::const_iterator> order;
  for (auto it = tensors.begin(); it != tensors.end(); ++it) order.push_back(it);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a->second.data, a->second.bytes) < std::pair(b->second.data, b->second.bytes);
  });
  const uint8_t* at = data.data();
  for (const auto& it : order) {
    if (it->second.data < at) return Bad(it->first, "data_offsets overlap another tensor");
    if (it->second.data > at) return Bad(it->first, "data_offsets leave a gap");
    at += it->second.bytes;
  }
  const size_t covered = static_cast<size_t>(at - data.data());
  if (covered != data.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(data.size() - covered, " bytes after the last tensor"));
  }
  return absl::OkStatus();
}

absl::Status InFile(const std::string& path, const absl::Status& status) {
  return {status.code(), absl::StrCat(path, ": ", status.message())};
}

}  // namespace

absl::StatusOr<TensorMap> ParseSafetensors(absl::Span<const uint8_t> file) {
  uint64_t header_bytes = 0;
  if (file.size() < sizeof(header_bytes)) {
    return absl::InvalidArgumentError("shorter than a safetensors file's header length");
  }
  for (size_t i = 0; i < sizeof(header_bytes); ++i) header_bytes |= uint64_t{file[i]} << (8 * i);
  if (header_bytes > kMaxSafetensorsHeaderBytes ||
      header_bytes > file.size() - sizeof(header_bytes)) {
    return absl::InvalidArgumentError(absl::StrCat("header of ", header_bytes,
                                                   " bytes in a file of ", file.size(),
                                                   " (at most ", kMaxSafetensorsHeaderBytes, ")"));
  }
  const char* header_text = reinterpret_cast<const char*>(file.data() + sizeof(header_bytes));
  WINNOW_ASSIGN_OR_RETURN(const Json header, ParseHeader({header_text, header_bytes}));
  const absl::Span<const uint8_t> data = file.subspan(sizeof(header_bytes) + header_bytes);
  TensorMap tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    WINNOW_ASSIGN_OR_RETURN(TensorView view, ParseTensor(name, entry, data));
    tensors.emplace(name, std::move(view));
  }
  WINNOW_RETURN_IF_ERROR(CheckCover(tensors, data));
  return tensors;
}

TensorFiles::~TensorFiles() {
  for (const Mapping& mapping : mappings_) munmap(mapping.data, mapping.bytes);
}

absl::Status TensorFiles::Map(const std::string& path, TensorMap* tensors) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    const std::string message = absl::StrCat(path, ": ", std::strerror(errno));
    if (errno == ENOENT || errno == ENOTDIR) return absl::NotFoundError(message);
    return absl::UnavailableError(message);
  }
  const absl::Cleanup close_fd = [fd] { close(fd); };
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size == 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": empty or not a regular file"));
  }
  const size_t bytes = static_cast<size_t>(info.st_size);
  void* data = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) {
    return absl::UnavailableError(absl::StrCat(path, ": mmap: ", std::strerror(errno)));
  }
  mappings_.push_back({data, bytes});
  absl::StatusOr<TensorMap> parsed = ParseSafetensors({static_cast<const uint8_t*>(data), bytes});
  if (!parsed.ok()) return InFile(path, parsed.status());
  *tensors = *std::move(parsed);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TensorFiles>> TensorFiles::OpenFile(const std::string& path) {
  std::unique_ptr<TensorFiles> files(new TensorFiles());
  WINNOW_RETURN_IF_ERROR(files->Map(path, &files->tensors_));
  return files;
}

absl::Status TensorFiles::MapShards(const std::string& dir, const std::string& index_path) {
  WINNOW_ASSIGN_OR_RETURN(const std::string text,
                          ReadSmallFile(index_path, kMaxSafetensorsHeaderBytes));
  const Json index = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  const Json* map = nullptr;
  if (index.is_object() && index.contains("weight_map")) map = &index["weight_map"];
  if (map == nullptr || !map->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(index_path, ": no weight_map"));
  }
  std::map<std::string, TensorMap> shards;
  for (const auto& [name, file] : map->items()) {
    const std::string shard = file.is_string() ? file.get<std::string>() : std::string();
    if (!absl::EndsWith(shard, ".safetensors") || absl::StrContains(shard, "/")) {
      return absl::InvalidArgumentError(absl::StrCat(index_path, ": tensor ", name, ": \"", shard,
                                                     "\" does not name a safetensors file"));
    }
    auto [it, is_new] = shards.try_emplace(shard);
    if (is_new) WINNOW_RETURN_IF_ERROR(Map(absl::StrCat(dir, "/", shard), &it->second));
    const auto tensor = it->second.find(name);
    if (tensor == it->second.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": tensor ", name, " is not in ", shard));
    }
    tensors_.emplace(name, tensor->second);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TensorFiles>> TensorFiles::OpenModel(const std::string& dir) {
  const std::string single = absl::StrCat(dir, "/model.safetensors");
  const std::string index = absl::StrCat(dir, "/model.safetensors.index.json");
  std::unique_ptr<TensorFiles> files(new TensorFiles());
  if (access(single.c_str(), F_OK) == 0) {
    WINNOW_RETURN_IF_ERROR(files->Map(single, &files->tensors_));
  } else if (access(index.c_str(), F_OK) == 0) {
    WINNOW_RETURN_IF_ERROR(files->MapShards(dir, index));
  } else {
    return absl::NotFoundError(
        absl::StrCat(dir, ": neither model.safetensors nor model.safetensors.index.json"));
  }
  return files;
}

const TensorView* TensorFiles::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

}  // namespace winnow
