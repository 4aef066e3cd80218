#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace budwood {

/// Every failure Budwood reports. what() reads "[where] fact": the function that refused, then the
/// thing it looked at, the value it found and the value it wanted.
class Error : public std::runtime_error {
 public:
  Error(std::string_view where, std::string_view fact)
      : std::runtime_error(std::string("[").append(where).append("] ").append(fact)) {}
};

}  // namespace budwood
