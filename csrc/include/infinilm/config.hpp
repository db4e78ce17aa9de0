// Reading the JSON that a backend is given, strictly: a key that nobody read is declined by its name and place.
//
// infinilm leaves out what is at its default, so a key that a backend does not know always changes the model. An object
// is read inside a function; when that returns, every key of the object must have been asked for:
//
//   Norm norm = infinilm::read_object(json, "final_norm", [](infinilm::Fields &fields) {
//     return Norm{fields.text("kind", "rms"), fields.number("eps", 1e-6)};
//   });
//
// Header-only, C++17, includes the standard library alone.
#ifndef INFINILM_CONFIG_HPP_
#define INFINILM_CONFIG_HPP_

#include <charconv>
#include <cmath>
#include <locale>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "infinilm/backend.hpp"

namespace infinilm {

// One JSON value (RFC 8259).
class Json {
 public:
  enum class Kind { null, boolean, number, string, array, object };

  Kind kind = Kind::null;
  bool boolean = false;
  double number = 0;
  int64_t integer = 0;      // where is_integer
  bool is_integer = false;  // written without fraction or exponent, and an int64_t
  std::string string;
  std::vector<Json> array;
  std::vector<std::pair<std::string, Json>> object;

  const Json *find(std::string_view key) const noexcept {
    for (const auto &entry : object) {
      if (entry.first == key) return &entry.second;
    }
    return nullptr;
  }
};

namespace detail {

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse(0);
    skip_space();
    if (at_ != text_.size()) fail("text behind the value");
    return value;
  }

 private:
  static constexpr int kMaxDepth = 64;

  [[noreturn]] void fail(const std::string &what) const {
    throw Error(INFINILM_INVALID, "this is no JSON: " + what + " at byte " + std::to_string(at_));
  }

  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  void expect(std::string_view word) {
    skip_space();
    if (!take(word)) fail("'" + std::string(word) + "' is missing");
  }

  Json parse(int depth) {
    if (depth > kMaxDepth) fail("values nested too deeply");
    skip_space();
    Json value;
    if (take("null")) return value;
    if (take("true") || take("false")) {
      value.kind = Json::Kind::boolean;
      value.boolean = text_[at_ - 2] == 'u';  // tr-u-e, fal-s-e
      return value;
    }
    if (at_ < text_.size() && text_[at_] == '"') {
      value.kind = Json::Kind::string;
      value.string = parse_string();
      return value;
    }
    if (take("[")) return parse_array(depth);
    if (take("{")) return parse_object(depth);
    return parse_number();
  }

  Json parse_array(int depth) {
    Json value;
    value.kind = Json::Kind::array;
    skip_space();
    if (take("]")) return value;
    while (true) {
      value.array.push_back(parse(depth + 1));
      skip_space();
      if (take("]")) return value;
      expect(",");
    }
  }

  Json parse_object(int depth) {
    Json value;
    value.kind = Json::Kind::object;
    skip_space();
    if (take("}")) return value;
    while (true) {
      skip_space();
      if (at_ >= text_.size() || text_[at_] != '"') fail("a key is missing");
      std::string key = parse_string();
      if (value.find(key) != nullptr) fail("the key '" + key + "' again");
      expect(":");
      Json item = parse(depth + 1);
      value.object.emplace_back(std::move(key), std::move(item));
      skip_space();
      if (take("}")) return value;
      expect(",");
    }
  }

  Json parse_number() {
    const std::size_t start = at_;
    while (at_ < text_.size() && std::string_view("+-.eE0123456789").find(text_[at_]) != std::string_view::npos) ++at_;
    const std::string word(text_.substr(start, at_ - start));
    Json value;
    value.kind = Json::Kind::number;
    const auto parsed = std::from_chars(word.data(), word.data() + word.size(), value.integer);
    value.is_integer = parsed.ec == std::errc() && parsed.ptr == word.data() + word.size() && !word.empty();
    std::istringstream stream(word);  // strtod would follow the process's locale
    stream.imbue(std::locale::classic());
    stream >> value.number;
    if (word.empty() || word[0] == '+' || stream.fail() || !stream.eof() || !std::isfinite(value.number)) {
      at_ = start;
      fail("a value is missing");
    }
    return value;
  }

  std::string parse_string() {
    std::string text;
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("a control character in a string");
      if (text_[at_] != '\\') {
        text += text_[at_];
        continue;
      }
      parse_escape(text);
    }
    if (at_ >= text_.size()) fail("a string without an end");
    ++at_;
    return text;
  }

  void parse_escape(std::string &text) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
    if (++at_ >= text_.size()) fail("a string without an end");
    const std::size_t index = kNames.find(text_[at_]);
    if (index != std::string_view::npos) {
      text += kValues[index];
      return;
    }
    if (text_[at_] != 'u') fail("an unknown escape");
    uint32_t code = parse_hex();
    if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_ + 1, 2) == "\\u") {
      at_ += 2;
      const uint32_t low = parse_hex();
      if (low < 0xDC00 || low > 0xDFFF) fail("half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xD800 && code < 0xE000) {
      fail("half a surrogate pair");
    }
    append_utf8(text, code);
  }

  // Reads the four digits behind the 'u' at at_, and leaves at_ at the last of them.
  uint32_t parse_hex() {
    uint32_t code = 0;
    if (at_ + 4 >= text_.size()) fail("a string without an end");
    const char *first = text_.data() + at_ + 1;
    const auto parsed = std::from_chars(first, first + 4, code, 16);
    if (parsed.ec != std::errc() || parsed.ptr != first + 4) fail("an unknown escape");
    at_ += 4;
    return code;
  }

  static void append_utf8(std::string &text, uint32_t code) {
    if (code < 0x80) {
      text += static_cast<char>(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    constexpr uint32_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
    text += static_cast<char>(kLead[more] | (code >> (6 * more)));
    for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3F));
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace detail

// Returns the value of a JSON text. Throws Error.
inline Json parse_json(std::string_view text) { return detail::Parser(text).document(); }

// The keys of one object, each marked as it is asked for. Made by read_object.
class Fields {
 public:
  Fields(const Fields &) = delete;
  Fields &operator=(const Fields &) = delete;

  // Where the object is in the document: "layers[3].mixer".
  const std::string &path() const noexcept { return path_; }

  // Return a value; throw Unsupported where it is of another type, or missing and there is no default.
  int64_t integer(std::string_view key) { return as_integer(key, require(key)); }
  int64_t integer(std::string_view key, int64_t otherwise) {
    const Json *value = take(key);
    return value == nullptr ? otherwise : as_integer(key, *value);
  }
  double number(std::string_view key) { return as(key, require(key), Json::Kind::number, "a number").number; }
  double number(std::string_view key, double otherwise) {
    const Json *value = take(key);
    return value == nullptr ? otherwise : as(key, *value, Json::Kind::number, "a number").number;
  }
  bool flag(std::string_view key, bool otherwise) {
    const Json *value = take(key);
    return value == nullptr ? otherwise : as(key, *value, Json::Kind::boolean, "true or false").boolean;
  }
  std::string text(std::string_view key) { return as(key, require(key), Json::Kind::string, "a string").string; }
  std::string text(std::string_view key, std::string_view otherwise) {
    const Json *value = take(key);
    return value == nullptr ? std::string(otherwise) : as(key, *value, Json::Kind::string, "a string").string;
  }
  const std::vector<Json> &array(std::string_view key) {
    return as(key, require(key), Json::Kind::array, "an array").array;
  }
  // The value of an optional object; nullptr where it is missing or null. Read it with read_object.
  const Json *find(std::string_view key) { return take(key); }
  const Json &require(std::string_view key) {
    const Json *value = take(key);
    if (value == nullptr) throw Unsupported(place(key) + " is missing");
    return *value;
  }

  // Declines a part of another kind than `wanted`; one that only a plugin knows is of kind "named", and has a name.
  void require_kind(std::string_view wanted) {
    const std::string kind = text("kind");
    if (kind == wanted) return;
    const std::string part = kind == "named" ? text("name") : kind;
    throw Unsupported(path_ + " is '" + part + "', and this backend knows '" + std::string(wanted) + "'");
  }

  // Where the value of `key` is in the document, for messages and for read_object.
  std::string place(std::string_view key) const {
    return path_.empty() ? std::string(key) : path_ + "." + std::string(key);
  }

 private:
  template <class Body>
  friend auto read_object(const Json &, std::string, Body &&);

  Fields(const Json &json, std::string path) : json_(json), path_(std::move(path)), is_read_(json.object.size()) {
    if (json.kind != Json::Kind::object) throw Unsupported((path_.empty() ? "the config" : path_) + " is no object");
  }

  const Json *take(std::string_view key) {
    for (std::size_t i = 0; i < json_.object.size(); ++i) {
      if (json_.object[i].first != key) continue;
      is_read_[i] = true;
      return json_.object[i].second.kind == Json::Kind::null ? nullptr : &json_.object[i].second;
    }
    return nullptr;
  }

  const Json &as(std::string_view key, const Json &value, Json::Kind kind, const char *wanted) const {
    if (value.kind != kind) throw Unsupported(place(key) + " is not " + wanted);
    return value;
  }

  int64_t as_integer(std::string_view key, const Json &value) const {
    if (value.kind != Json::Kind::number || !value.is_integer) throw Unsupported(place(key) + " is not an integer");
    return value.integer;
  }

  void require_all_read() const {
    std::string unknown;
    for (std::size_t i = 0; i < is_read_.size(); ++i) {
      if (!is_read_[i]) unknown += (unknown.empty() ? "'" : ", '") + json_.object[i].first + "'";
    }
    if (!unknown.empty()) {
      throw Unsupported((path_.empty() ? "the config" : path_) + " has " + unknown + ", which this backend does not know");
    }
  }

  const Json &json_;
  std::string path_;
  std::vector<bool> is_read_;
};

// Calls body(fields) for the object `json`, which is at `path` in its document, and returns what that returns. Throws
// Unsupported where it is no object, or has a key that was not asked for.
template <class Body>
auto read_object(const Json &json, std::string path, Body &&body) {
  Fields fields(json, std::move(path));
  if constexpr (std::is_void_v<decltype(body(fields))>) {
    body(fields);
    fields.require_all_read();
  } else {
    auto result = body(fields);
    fields.require_all_read();
    return result;
  }
}

}  // namespace infinilm

#endif
