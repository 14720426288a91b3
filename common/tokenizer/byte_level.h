#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace winnow {

// GPT-2's spelling of bytes as printable characters: a printable byte of Latin-1 is
// itself, the others are U+0100, U+0101, ... in order (' ' is "Ġ", U+0120).

// The UTF-8 spelling of `byte`, 1 or 2 bytes; valid forever.
const std::string& ByteSpelling(uint8_t byte);

// The bytes that `spelling` stands for, or nullopt if a character of it is none of the
// 256.
std::optional<std::string> BytesOfSpelling(std::string_view spelling);

}  // namespace winnow
