#include "router/text_stream.h"

#include <algorithm>
#include <utility>

namespace winnow::router {

TextStream::TextStream(const Tokenizer* tokenizer, bool skip_special, std::vector<std::string> stop,
                       std::vector<int32_t> stop_token_ids)
    : decoder_(tokenizer, skip_special),
      stop_(std::move(stop)),
      stop_token_ids_(std::move(stop_token_ids)) {}

void TextStream::Append(int32_t token, std::string* text) {
  if (stopped()) return;
  if (std::find(stop_token_ids_.begin(), stop_token_ids_.end(), token) != stop_token_ids_.end()) {
    stop_token_id_ = token;
    return;
  }
  held_ += decoder_.Append(token);
  Release(text);
}

void TextStream::Finish(std::string* text) {
  if (stop_text_.has_value()) return;
  held_ += decoder_.Finish();
  Release(text);
  if (stop_text_.has_value()) {
    stop_token_id_.reset();
    return;
  }
  text->append(held_);
  held_.clear();
}

void TextStream::Release(std::string* text) {
  // The first occurrence of any; of two at one place, the first in the list.
  size_t found_at = held_.npos;
  for (const std::string& stop : stop_) {
    const size_t at = held_.find(stop);
    if (at < found_at) {
      found_at = at;
      stop_text_ = stop;
    }
  }
  if (stop_text_.has_value()) {
    text->append(held_, 0, found_at);
    held_.clear();
    return;
  }
  // Keep the longest end of held_ that begins a stop string.
  size_t keep = 0;
  for (const std::string& stop : stop_) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n) {
      if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) keep = n;
    }
  }
  const size_t cut = held_.size() - keep;
  text->append(held_, 0, cut);
  held_.erase(0, cut);
}

}  // namespace winnow::router
