#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace winnow {

// OK if `text` is well-formed UTF-8 (no surrogates, no overlong forms, at most
// U+10FFFF), else INVALID_ARGUMENT that begins with `what` and names byte and offset.
absl::Status CheckUtf8(std::string_view text, std::string_view what);

// Turns a stream of bytes, cut anywhere, into well-formed UTF-8: each maximal
// ill-formed part becomes U+FFFD, as Unicode 3.9 and the W3C recommend.
class Utf8Decoder {
 public:
  // Appends to `out` the characters that are complete after `bytes`.
  void Append(std::string_view bytes, std::string* out);
  // Ends the stream: an unfinished character becomes U+FFFD. *this is then as new.
  void Finish(std::string* out);

 private:
  std::string pending_;  // at most 3 bytes: a proper prefix of a character
};

// Unicode normalization form C of well-formed `text`, in O(n log n) time.
std::string NormalizeNfc(std::string_view text);

}  // namespace winnow
