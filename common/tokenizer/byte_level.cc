#include "common/tokenizer/byte_level.h"

#include <array>

namespace winnow {
namespace {

struct Table {
  std::array<std::string, 256> spelling;
  std::array<int, 0x144> byte;  // by code point; -1: none
};

bool IsPrintable(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

const Table& GetTable() {
  static const Table* const table = [] {
    auto* t = new Table;
    t->byte.fill(-1);
    int next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const int point = IsPrintable(byte) ? byte : next++;
      t->byte[static_cast<size_t>(point)] = byte;
      std::string& spelling = t->spelling[static_cast<size_t>(byte)];
      if (point >= 0x80) spelling.push_back(static_cast<char>(0xC0 | point >> 6));
      spelling.push_back(static_cast<char>(point >= 0x80 ? 0x80 | (point & 0x3F) : point));
    }
    return t;
  }();
  return *table;
}

}  // namespace

const std::string& ByteSpelling(uint8_t byte) { return GetTable().spelling[byte]; }

std::optional<std::string> BytesOfSpelling(std::string_view spelling) {
  const Table& table = GetTable();
  std::string bytes;
  for (size_t i = 0; i < spelling.size(); ++i) {
    size_t point = static_cast<unsigned char>(spelling[i]);
    if (point >= 0x80) {
      if (point < 0xC2 || point > 0xC5 || i + 1 == spelling.size()) return std::nullopt;
      point = (point & 0x1F) << 6 | (static_cast<unsigned char>(spelling[++i]) & 0x3F);
    }
    if (point >= table.byte.size() || table.byte[point] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(table.byte[point]));
  }
  return bytes;
}

}  // namespace winnow
