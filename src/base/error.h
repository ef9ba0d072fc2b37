// Error types of the whole program, and the assertion for our own bugs.
// Bad input throws one of these with what was wrong, where, what was expected and what was found; system failures
// throw SystemError with the call that failed. They are caught in few places: main, one per HTTP request, one per
// connection, one per engine step.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace caravan {

// Base of every error that carries a message for a person.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A file does not hold what its format demands. The message names the file and the key, tensor or offset.
class FormatError : public Error {
 public:
  using Error::Error;
};

// A request (HTTP body, command line, environment variable) asks for something invalid. kind() selects the HTTP status.
class RequestError : public Error {
 public:
  enum class Kind { invalid, context_exceeded, unauthorized, not_found, not_supported, unavailable };
  explicit RequestError(const std::string& message, Kind kind = Kind::invalid) : Error(message), kind_(kind) {}
  Kind kind() const { return kind_; }

 private:
  Kind kind_;
};

// A peer broke the wire protocol; its connection is closed with this reason.
class ProtocolError : public Error {
 public:
  using Error::Error;
};

// Memory, a device or another resource does not suffice; the message holds need and have.
class ResourceError : public Error {
 public:
  using Error::Error;
};

// Something known that this version does not do: the message names it and what is supported instead.
class NotSupportedError : public Error {
 public:
  using Error::Error;
};

// A system call failed. The message names the call, its object and the reason of errno.
class SystemError : public Error {
 public:
  // what: the call and its object, e.g. "open '/models/a.gguf'"; error_number: errno after the call.
  SystemError(std::string_view what, int error_number);
  int error_number() const { return error_number_; }

 private:
  int error_number_;
};

// Prints the failed condition and aborts; only for conditions that no input can break.
[[noreturn]] void assertion_failed(const char* condition, const char* why, const char* file, int line);

}  // namespace caravan

// Checks an invariant of our own code in every build type. why says why the condition must hold.
#define CARAVAN_ASSERT(condition, why) \
  ((condition) ? static_cast<void>(0) : ::caravan::assertion_failed(#condition, why, __FILE__, __LINE__))
