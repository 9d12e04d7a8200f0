#include "common/precision.h"

#include "common/check.h"

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

Precision precision_named(const std::string& name, const std::string& what) {
  for (const Precision precision : {Precision::float32, Precision::bf16, Precision::int8}) {
    if (name == precision_name(precision)) return precision;
  }
  fail(ErrorKind::config, what, ": expected float32, bf16 or int8, got '", name, "'");
}

}  // namespace avser
