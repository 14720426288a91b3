#pragma once

#include <string>

#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace winnow::testing {

// A tiny model and a DMS adapter for it, on disk while the object lives.
class TinyServed {
 public:
  explicit TinyServed(const TinyModelOptions& model = {}, const TinyAdapterOptions& adapter = {})
      : max_positions_(model.max_positions) {
    WriteTinyModel(model_.path(), model);
    WriteTinyAdapter(adapter_.path(), model, adapter);
  }

  const std::string& dir() const { return model_.path(); }
  const std::string& adapter_dir() const { return adapter_.path(); }
  int max_model_len() const { return max_positions_; }

 private:
  TempDir model_, adapter_;
  const int max_positions_;
};

}  // namespace winnow::testing
