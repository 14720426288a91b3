#include "cli/eval/dump.h"

#include <cstring>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "cli/output.h"

namespace winnow::cli {
namespace {

// A safetensors file under construction: all headers first, then the data in order.
class SafetensorsWriter {
 public:
  void Add(const std::string& name, const char* dtype, const std::vector<int64_t>& shape,
           const void* data, size_t bytes) {
    header_[name] = {
        {"dtype", dtype}, {"shape", shape}, {"data_offsets", {data_.size(), data_.size() + bytes}}};
    data_.append(static_cast<const char*>(data), bytes);
  }
  void AddMetadata(const std::string& key, const std::string& value) {
    header_["__metadata__"][key] = value;
  }
  std::string Finish() const {
    std::string header = header_.dump();
    header.resize((header.size() + 7) / 8 * 8, ' ');  // the data is aligned
    uint64_t size = header.size();
    char prefix[8];
    for (char& byte : prefix) {
      byte = static_cast<char>(size & 0xff);
      size >>= 8;
    }
    return absl::StrCat(absl::string_view(prefix, sizeof(prefix)), header, data_);
  }

 private:
  nlohmann::ordered_json header_ = nlohmann::ordered_json::object();
  std::string data_;
};

}  // namespace

absl::Status WriteDump(const std::string& path, const Dump& dump, const Model& model) {
  SafetensorsWriter writer;
  writer.AddMetadata("mode", dump.mode);
  if (!dump.decisions.empty() && model.dms().has_value()) {
    const DmsConfig& dms = *model.dms();
    writer.AddMetadata("dms_threshold", absl::StrCat(dump.threshold));
    writer.AddMetadata("dms_window_size", absl::StrCat(dms.window));
    writer.AddMetadata("dms_decision_shift", absl::StrCat(dms.shift));
    writer.AddMetadata("dms_alpha_scale", absl::StrCat(dms.rule.scale));
    writer.AddMetadata("dms_initial_alpha_offset", absl::StrCat(dms.rule.offset));
  }
  const int64_t n = static_cast<int64_t>(dump.tokens.size());
  writer.Add("tokens", "I32", {n}, dump.tokens.data(), dump.tokens.size() * sizeof(int32_t));
  const int64_t rows = static_cast<int64_t>(dump.logits.size()) / dump.vocab;
  writer.Add("logits", "F32", {rows, dump.vocab}, dump.logits.data(),
             dump.logits.size() * sizeof(float));
  if (!dump.decisions.empty()) {
    writer.Add("decisions", "U8", {dump.num_layers, n, dump.num_kv_heads}, dump.decisions.data(),
               dump.decisions.size());
  }
  return WriteFile(path, writer.Finish());
}

}  // namespace winnow::cli
