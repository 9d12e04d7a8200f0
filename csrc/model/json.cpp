#include "model/json.h"

#include <charconv>
#include <locale>
#include <sstream>

namespace avser {
namespace {

constexpr int kMaxDepth = 64;

class Parser {
 public:
  Parser(std::string_view text, ErrorKind kind, const std::string& what) : text_(text), kind_(kind), what_(what) {}

  Json document() {
    Json json = value(0);
    skip_space();
    if (at_ < text_.size()) refuse("the end");
    return json;
  }

 private:
  [[noreturn]] void refuse(const char* expected) const {
    if (at_ >= text_.size()) fail(kind_, what_, ": expected ", expected, " in JSON, got the end of the text");
    const auto c = static_cast<unsigned char>(text_[at_]);
    const std::string got = c > 0x20 && c < 0x7f ? cat("'", text_[at_], "'") : cat("byte ", static_cast<int>(c));
    fail(kind_, what_, ": expected ", expected, " in JSON, got ", got, " at position ", at_);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void skip_space() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
  }

  Json value(int depth) {
    skip_space();
    switch (peek()) {
      case '{':
        return {object(depth)};
      case '[':
        return {array(depth)};
      case '"':
        return {string()};
      case 't':
        return word("true", {true});
      case 'f':
        return word("false", {false});
      case 'n':
        return word("null", {nullptr});
      default:
        return number();
    }
  }

  Json word(std::string_view name, Json meaning) {
    if (text_.substr(at_, name.size()) != name) refuse("a value");
    at_ += name.size();
    return meaning;
  }

  Json::Object object(int depth) {
    if (depth == kMaxDepth) refuse("at most 64 levels of nesting");
    Json::Object members;
    ++at_;
    skip_space();
    if (take('}')) return members;
    do {
      skip_space();
      if (peek() != '"') refuse("a name");
      const size_t start = at_;
      std::string name = string();
      skip_space();
      if (!take(':')) refuse("':'");
      if (!members.emplace(std::move(name), value(depth + 1)).second) {
        at_ = start;
        refuse("a name only once in an object");
      }
      skip_space();
    } while (take(','));
    if (!take('}')) refuse("',' or '}'");
    return members;
  }

  Json::Array array(int depth) {
    if (depth == kMaxDepth) refuse("at most 64 levels of nesting");
    Json::Array items;
    ++at_;
    skip_space();
    if (take(']')) return items;
    do {
      items.push_back(value(depth + 1));
      skip_space();
    } while (take(','));
    if (!take(']')) refuse("',' or ']'");
    return items;
  }

  std::string string() {
    std::string out;
    ++at_;
    while (!take('"')) {
      if (at_ >= text_.size() || static_cast<unsigned char>(text_[at_]) < 0x20) refuse("'\"'");
      if (take('\\')) {
        escape(out);
      } else {
        character(out);
      }
    }
    return out;
  }

  void escape(std::string& out) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const size_t found = at_ < text_.size() ? kNames.find(text_[at_]) : std::string_view::npos;
    if (found != std::string_view::npos) {
      ++at_;
      out += kMeanings[found];
      return;
    }
    if (!take('u')) refuse("an escape");
    uint32_t code = hex4();
    if (code >= 0xdc00 && code < 0xe000) refuse("the first half of a surrogate pair first");
    if (code >= 0xd800 && code < 0xdc00) {
      if (!take('\\') || !take('u')) refuse("the second half of a surrogate pair");
      const uint32_t second = hex4();
      if (second < 0xdc00 || second >= 0xe000) refuse("the second half of a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (second - 0xdc00);
    }
    if (code < 0x80) {
      out += static_cast<char>(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static constexpr int kLead[] = {0, 0xc0, 0xe0, 0xf0};
    out += static_cast<char>(kLead[more] | (code >> (6 * more)));
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3f));
  }

  uint32_t hex4() {
    uint32_t code = 0;
    const char* first = text_.data() + at_;
    if (text_.size() - at_ < 4 || std::from_chars(first, first + 4, code, 16).ptr != first + 4) {
      refuse("four hexadecimal digits");
    }
    at_ += 4;
    return code;
  }

  // One character of UTF-8: no overlong forms, no surrogates, nothing beyond U+10FFFF.
  void character(std::string& out) {
    const auto byte = [&](size_t i) { return at_ + i < text_.size() ? static_cast<unsigned char>(text_[at_ + i]) : 0; };
    const int lead = byte(0);
    size_t size = 1;
    int low = 0x80, high = 0xbf;  // what the second byte may be
    if (lead >= 0xc2 && lead <= 0xdf) {
      size = 2;
    } else if (lead >= 0xe0 && lead <= 0xef) {
      size = 3;
      if (lead == 0xe0) low = 0xa0;
      if (lead == 0xed) high = 0x9f;
    } else if (lead >= 0xf0 && lead <= 0xf4) {
      size = 4;
      if (lead == 0xf0) low = 0x90;
      if (lead == 0xf4) high = 0x8f;
    } else if (lead >= 0x80) {
      refuse("UTF-8");
    }
    for (size_t i = 1; i < size; ++i) {
      if (byte(i) < low || byte(i) > high) refuse("UTF-8");
      low = 0x80;
      high = 0xbf;
    }
    out.append(text_.substr(at_, size));
    at_ += size;
  }

  void digits() {
    if (peek() < '0' || peek() > '9') refuse("a digit");
    while (peek() >= '0' && peek() <= '9') ++at_;
  }

  Json number() {
    const size_t start = at_;
    const bool negative = take('-');
    if (!negative && (peek() < '0' || peek() > '9')) refuse("a value");
    if (!take('0')) digits();
    const size_t whole = at_;
    if (take('.')) digits();
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      digits();
    }
    const std::string_view found = text_.substr(start, at_ - start);
    if (at_ == whole) {
      int64_t integer = 0;
      if (std::from_chars(found.data(), found.data() + found.size(), integer).ec == std::errc()) return {integer};
    } else {
      // Not strtod, which reads as the program's locale says; libc++ has no from_chars for doubles yet.
      std::istringstream stream{std::string(found)};
      stream.imbue(std::locale::classic());
      double real = 0;
      if (stream >> real) return {real};
    }
    at_ = start;
    refuse("a number within the range of its type");
  }

  const std::string_view text_;
  const ErrorKind kind_;
  const std::string& what_;
  size_t at_ = 0;
};

}  // namespace

const Json* Json::find(const std::string& name) const {
  const auto* members = as<Object>();
  if (members == nullptr) return nullptr;
  const auto found = members->find(name);
  return found == members->end() ? nullptr : &found->second;
}

std::string Json::describe() const {
  if (const auto* flag = as<bool>()) return *flag ? "true" : "false";
  if (const auto* integer = as<int64_t>()) return cat(*integer);
  if (const auto* real = as<double>()) return cat(*real);
  if (const auto* text = as<std::string>()) return cat("'", *text, "'");
  if (const auto* items = as<Array>()) return cat("a list of ", items->size());
  return as<Object>() != nullptr ? "an object" : "null";
}

Json parse_json(std::string_view text, ErrorKind kind, const std::string& what) {
  return Parser(text, kind, what).document();
}

}  // namespace avser
