// Text that came from a plugin, made safe to show: bounded, and UTF-8 whatever it was.
#pragma once

#include <cstddef>
#include <string>

namespace infinilm::host {

// Returns what stands at `text` up to a zero byte or `limit` bytes, each byte that is no UTF-8 replaced by U+FFFD.
// "" where `text` is null.
std::string clean_text(const char *text, std::size_t limit);

}  // namespace infinilm::host
