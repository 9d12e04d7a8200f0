// Model files as avser_fast/inference/weights.py writes them: safetensors with one JSON header under the metadata key
// `avser_fast`.
#pragma once

#include <string>

#include "engine/buffer.h"
#include "engine/weights.h"
#include "model/json.h"

namespace avser {

struct ModelFile {
  Json header;          // `format`, `kind`, `spec`, `card`
  Tensors tensors;      // float32, finite; they lie in `data`
  Tensors calibration;  // ranges of int8, by value
  Buffer data;
};

// A model error whose sentence names the file, for anything that is not a whole model file of kind `mdscm` in a format
// that this version knows.  Nothing that the file says is trusted: every size is checked before it is used.
ModelFile read_model_file(const std::string& path);

}  // namespace avser
