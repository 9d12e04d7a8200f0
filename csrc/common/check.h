// Errors that reach a user: one sentence naming the op and argument, what was expected and what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace avser {

// Each kind becomes the class of the same name in avser_fast.errors (input -> InputError, ...).
enum class ErrorKind { input, model, config, backend };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// cat("a", 3, 0.5) -> "a30.5"
template <typename... Parts>
std::string cat(Parts&&... parts) {
  std::ostringstream stream;
  (stream << ... << std::forward<Parts>(parts));
  return stream.str();
}

template <typename... Parts>
[[noreturn]] void fail(ErrorKind kind, Parts&&... parts) {
  throw Error(kind, cat(std::forward<Parts>(parts)...));
}

}  // namespace avser

// AVSER_CHECK(n > 0, input, "log_mel: waveform: expected at least 1 sample, got ", n);
// The parts are only evaluated when the condition is false.
#define AVSER_CHECK(condition, kind, ...)                                   \
  do {                                                                      \
    if (!(condition)) ::avser::fail(::avser::ErrorKind::kind, __VA_ARGS__); \
  } while (0)
