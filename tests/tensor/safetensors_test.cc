#include "common/tensor/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <ostream>
#include <random>

#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace winnow::testing {
namespace {

using ::testing::HasSubstr;

// A file of this header and so many bytes of data.
std::string File(const std::string& header, size_t data_bytes) {
  std::string file(8, '\0');
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(header.size() >> (8 * i));
  return file + header + std::string(data_bytes, '\x01');
}

absl::StatusOr<TensorMap> Parse(const std::string& file) {
  // A copy of its own length: ASan sees a read past the end.
  const std::vector<uint8_t> bytes(file.begin(), file.end());
  absl::StatusOr<TensorMap> tensors = ParseSafetensors(bytes);
  if (tensors.ok()) {
    for (const auto& [name, view] : *tensors) {
      EXPECT_GE(view.data, bytes.data()) << name;
      EXPECT_LE(view.data + view.bytes, bytes.data() + bytes.size()) << name;
    }
  }
  return tensors;
}

TEST(ParseSafetensors, ReadsNamesTypesShapesAndOffsets) {
  const std::string file = File(
      R"({"__metadata__": {"format": "pt"},
          "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
          "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
          "empty": {"dtype": "I64", "shape": [0, 5], "data_offsets": [12, 12]}})",
      16);
  const std::vector<uint8_t> bytes(file.begin(), file.end());
  const absl::StatusOr<TensorMap> tensors = ParseSafetensors(bytes);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 3u);
  const TensorView& a = tensors->at("a");
  EXPECT_EQ(a.dtype, DType::kBf16);
  EXPECT_EQ(a.dims, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(a.data, bytes.data() + bytes.size() - 16);
  EXPECT_EQ(a.bytes, 12u);
  EXPECT_EQ(tensors->at("b").data, a.data + 12);
  EXPECT_EQ(tensors->at("empty").bytes, 0u);
}

struct BadCase {
  const char* name;
  std::string file;
  const char* message;
};

void PrintTo(const BadCase& c, std::ostream* os) { *os << c.name; }

std::string Entry(const std::string& fields, size_t data_bytes = 8) {
  return File("{\"t\": {" + fields + "}}", data_bytes);
}

const BadCase kBadCases[] = {
    {"Empty", "", "header length"},
    {"SevenBytes", std::string(7, '\0'), "header length"},
    {"HeaderPastTheEnd", std::string("\xff\0\0\0\0\0\0\0{}", 10), "header of 255 bytes"},
    {"AbsurdHeaderLength", std::string(8, '\xff') + "{}", "header of 18446744073709551615 bytes"},
    {"NotJson", File("{\"t\":", 0), "not a JSON object"},
    {"NotAnObject", File("[1]", 0), "not a JSON object"},
    {"NanInJson", Entry(R"("dtype": "F32", "shape": [NaN], "data_offsets": [0, 8])"),
     "not a JSON object"},
    {"TwiceTheSameName",
     File(R"({"t": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
              "t": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}})",
          8),
     "named twice"},
    {"EntryNotAnObject", File(R"({"t": 3})", 0), "not an object"},
    {"NoDtype", Entry(R"("shape": [2], "data_offsets": [0, 8])"), "dtype is missing"},
    {"UnknownDtype", Entry(R"("dtype": "F31", "shape": [2], "data_offsets": [0, 8])"),
     "dtype=F31 is unknown"},
    {"NoShape", Entry(R"("dtype": "F32", "data_offsets": [0, 8])"), "shape is not"},
    {"NegativeSize", Entry(R"("dtype": "F32", "shape": [-2], "data_offsets": [0, 8])"),
     "shape is not"},
    {"FractionalSize", Entry(R"("dtype": "F32", "shape": [2.0], "data_offsets": [0, 8])"),
     "shape is not"},
    {"NineDims", Entry(R"("dtype": "U8", "shape": [1,1,1,1,1,1,1,1,8], "data_offsets": [0, 8])"),
     "shape is not"},
    {"SizeOverflows",
     Entry(R"("dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8])"),
     "overflows"},
    {"HugeSize", Entry(R"("dtype": "U8", "shape": [18446744073709551615], "data_offsets": [0, 8])"),
     "shape is not"},
    {"OneOffset", Entry(R"("dtype": "F32", "shape": [2], "data_offsets": [0])"), "data_offsets"},
    {"OffsetsReversed", Entry(R"("dtype": "F32", "shape": [2], "data_offsets": [8, 0])"),
     "data_offsets=[8, 0]"},
    {"Truncated", Entry(R"("dtype": "F32", "shape": [2], "data_offsets": [0, 8])", 7),
     "data_offsets=[0, 8] in 7 bytes"},
    {"SizeAndOffsetsDisagree", Entry(R"("dtype": "F32", "shape": [3], "data_offsets": [0, 8])"),
     "takes 12 bytes"},
    {"Overlap",
     File(R"({"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
              "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}})",
          8),
     "overlap"},
    {"Gap",
     File(R"({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
              "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}})",
          8),
     "gap"},
    {"TrailingData", Entry(R"("dtype": "F32", "shape": [2], "data_offsets": [0, 8])", 9),
     "1 bytes after the last tensor"},
    {"DeeplyNested", File(std::string(100000, '['), 0), "not a JSON object"},
};

class ParseSafetensorsBad : public ::testing::TestWithParam<BadCase> {};

TEST_P(ParseSafetensorsBad, IsInvalidArgument) {
  const absl::StatusOr<TensorMap> tensors = Parse(GetParam().file);
  EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tensors.status().message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(Cases, ParseSafetensorsBad, ::testing::ValuesIn(kBadCases),
                         [](const auto& c) { return c.param.name; });

// Any byte of the header changed: read in bounds or refused.
TEST(ParseSafetensors, MutationsStayInBounds) {
  const std::string header =
      R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F16","shape":[2,1],"data_offsets":[3,7]}})";
  const std::string file = File(header, 7);
  std::mt19937_64 random(5);
  int refused = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string mutated = file;
    for (uint64_t i = 0; i < 1 + random() % 3; ++i) {
      mutated[random() % mutated.size()] = static_cast<char>(random());
    }
    if (!Parse(mutated).ok()) ++refused;
  }
  EXPECT_GT(refused, 10000);
}

TEST(TensorFiles, OpensOneFileOrShards) {
  const TempDir dir;
  const NamedTensor a{.name = "a", .dims = {2}, .values = {1.0f, 2.0f}, .f32 = true};
  const NamedTensor b{.name = "b", .dims = {1}, .values = {3.0f}, .f32 = true};
  WriteSafetensors(dir.File("model-00001-of-00002.safetensors"), {a});
  WriteSafetensors(dir.File("model-00002-of-00002.safetensors"), {b});
  dir.Write("model.safetensors.index.json",
            R"({"metadata": {"total_size": 12},
                "weight_map": {"a": "model-00001-of-00002.safetensors",
                               "b": "model-00002-of-00002.safetensors"}})");
  const auto shards = TensorFiles::OpenModel(dir.path());
  ASSERT_TRUE(shards.ok()) << shards.status();
  ASSERT_NE((*shards)->Find("b"), nullptr);
  EXPECT_EQ((*shards)->Find("c"), nullptr);
  float value = 0;
  std::memcpy(&value, (*shards)->Find("b")->data, sizeof(value));
  EXPECT_EQ(value, 3.0f);

  WriteSafetensors(dir.File("model.safetensors"), {b});  // goes first
  const auto single = TensorFiles::OpenModel(dir.path());
  ASSERT_TRUE(single.ok()) << single.status();
  EXPECT_EQ((*single)->tensors().size(), 1u);
}

TEST(TensorFiles, RefusesBadIndexes) {
  const TempDir dir;
  EXPECT_EQ(TensorFiles::OpenModel(dir.path()).status().code(), absl::StatusCode::kNotFound);
  WriteSafetensors(dir.File("a.safetensors"), {{.name = "a", .dims = {1}, .values = {1.0f}}});
  const struct {
    const char* index;
    absl::StatusCode code;
    const char* message;
  } cases[] = {
      {"{", absl::StatusCode::kInvalidArgument, "no weight_map"},
      {R"({"weight_map": []})", absl::StatusCode::kInvalidArgument, "no weight_map"},
      {R"({"weight_map": {"a": 3}})", absl::StatusCode::kInvalidArgument, "tensor a"},
      {R"({"weight_map": {"a": "../a.safetensors"}})", absl::StatusCode::kInvalidArgument,
       "../a.safetensors"},
      {R"({"weight_map": {"a": "pytorch_model.bin"}})", absl::StatusCode::kInvalidArgument,
       "pytorch_model.bin"},
      {R"({"weight_map": {"b": "a.safetensors"}})", absl::StatusCode::kInvalidArgument,
       "tensor b is not in a.safetensors"},
      {R"({"weight_map": {"a": "b.safetensors"}})", absl::StatusCode::kNotFound, "b.safetensors"},
  };
  for (const auto& c : cases) {
    dir.Write("model.safetensors.index.json", c.index);
    const absl::Status status = TensorFiles::OpenModel(dir.path()).status();
    EXPECT_EQ(status.code(), c.code) << c.index;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message)) << c.index;
  }
}

TEST(TensorFiles, RefusesWhatIsNoRegularFile) {
  const TempDir dir;
  EXPECT_EQ(TensorFiles::OpenFile(dir.path()).status().code(), absl::StatusCode::kInvalidArgument);
  dir.Write("empty", "");
  EXPECT_EQ(TensorFiles::OpenFile(dir.File("empty")).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(TensorFiles::OpenFile(dir.File("none")).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace winnow::testing
