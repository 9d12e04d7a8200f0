#include "common/precision.h"

namespace avser {

const char* precision_name(Precision p) {
  switch (p) {
    case Precision::bf16:
      return "bf16";
    case Precision::int8:
      return "int8";
    default:
      return "float32";
  }
}

}  // namespace avser
