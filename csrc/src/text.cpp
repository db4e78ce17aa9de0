#include "text.hpp"

#include <cstring>

namespace infinilm::host {
namespace {

// Returns how many bytes the character at `text` has, 0 where it is none (Unicode 15, table 3-7).
std::size_t character_size(const unsigned char *text, std::size_t left) {
  const unsigned char lead = text[0];
  if (lead < 0x80) return 1;
  const std::size_t size = lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (size == 0 || size > left) return 0;
  const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  if (text[1] < low || text[1] > high) return 0;
  for (std::size_t i = 2; i < size; ++i) {
    if ((text[i] & 0xC0) != 0x80) return 0;
  }
  return size;
}

}  // namespace

std::string clean_text(const char *text, std::size_t limit) {
  std::string clean;
  if (text == nullptr) return clean;
  const std::size_t size = strnlen(text, limit);
  const auto *bytes = reinterpret_cast<const unsigned char *>(text);
  for (std::size_t i = 0; i < size;) {
    const std::size_t taken = character_size(bytes + i, size - i);
    if (taken == 0) {
      clean += "\xEF\xBF\xBD";
    } else {
      clean.append(text + i, taken);
    }
    i += taken == 0 ? 1 : taken;
  }
  return clean;
}

}  // namespace infinilm::host
