// A strict reader of JSON (RFC 8259), enough for model files.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "common/check.h"

namespace avser {

// A number without fraction and exponent is an int64_t, any other a double.
struct Json {
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;

  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> value = nullptr;

  // Null unless the value has this type.
  template <typename T>
  const T* as() const {
    return std::get_if<T>(&value);
  }
  // A member of an object; null when there is none or this is no object.
  const Json* find(const std::string& name) const;
  // For "..., got " in messages: a scalar itself, or what kind of thing it is.
  std::string describe() const;
};

// Refused, as an error of `kind` whose sentence starts with `what`: anything that is not exactly one value, text that
// is not UTF-8, a name twice in an object, numbers beyond int64 or double, nesting beyond 64 levels.
Json parse_json(std::string_view text, ErrorKind kind, const std::string& what);

}  // namespace avser
