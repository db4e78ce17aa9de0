// The C++ helpers, driven from Python: `helpers json` writes back what it read from stdin, `helpers strict` reads a
// config of its own, `helpers guard` and `helpers give` print what came of each case.
#include <cstdio>
#include <iostream>
#include <iterator>
#include <string>

#include "infinilm/config.hpp"

namespace {

void write_text(const std::string &text) {
  std::putchar('"');
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      std::printf("\\%c", c);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      std::printf("\\u%04x", c);
    } else {
      std::putchar(c);
    }
  }
  std::putchar('"');
}

void write_json(const infinilm::Json &value) {
  using Kind = infinilm::Json::Kind;
  const char *separator = "";
  switch (value.kind) {
    case Kind::null: std::printf("null"); break;
    case Kind::boolean: std::printf(value.boolean ? "true" : "false"); break;
    case Kind::string: write_text(value.string); break;
    case Kind::number:
      if (value.is_integer) {
        std::printf("%lld", static_cast<long long>(value.integer));
      } else {
        std::printf("%.17g", value.number);
      }
      break;
    case Kind::array:
      std::putchar('[');
      for (const auto &item : value.array) {
        std::printf("%s", separator);
        separator = ",";
        write_json(item);
      }
      std::putchar(']');
      break;
    case Kind::object:
      std::putchar('{');
      for (const auto &entry : value.object) {
        std::printf("%s", separator);
        separator = ",";
        write_text(entry.first);
        std::putchar(':');
        write_json(entry.second);
      }
      std::putchar('}');
      break;
  }
}

void read_strictly(const std::string &text) {
  const infinilm::Json json = infinilm::parse_json(text);
  const int64_t total = infinilm::read_object(json, "", [](infinilm::Fields &fields) {
    int64_t sum = fields.integer("size") + fields.integer("more", 10);
    (void)fields.number("eps", 1e-6);
    (void)fields.flag("bias", false);
    (void)fields.text("kind", "rms");
    for (std::size_t i = 0; i < fields.array("layers").size(); ++i) {
      const std::string place = "layers[" + std::to_string(i) + "]";
      sum += infinilm::read_object(fields.array("layers")[i], place,
                                   [](infinilm::Fields &layer) { return layer.integer("width"); });
    }
    if (const infinilm::Json *extra = fields.find("extra")) {
      infinilm::read_object(*extra, fields.place("extra"), [&](infinilm::Fields &its) { sum += its.integer("n"); });
    }
    return sum;
  });
  std::printf("%lld\n", static_cast<long long>(total));
}

void show(int32_t code, const infinilm_error &error) { std::printf("%d %s\n", code, error.message); }

void try_guard() {
  auto error = infinilm::make_struct<infinilm_error>();
  show(infinilm::guard(&error, [] {}), error);
  show(infinilm::guard(&error, [] { throw infinilm::Unsupported("no"); }), error);
  show(infinilm::guard(&error, [] { throw infinilm::Error(77, "mine"); }), error);
  show(infinilm::guard(&error, [] { throw std::bad_alloc(); }), error);
  show(infinilm::guard(&error, [] { throw std::invalid_argument("bad"); }), error);
  show(infinilm::guard(&error, [] { throw std::runtime_error("broken"); }), error);
  show(infinilm::guard(&error, [] { throw 3; }), error);
  show(infinilm::guard(nullptr, [] { throw 3; }), error);
  std::string text(1022, 'x');
  show(infinilm::guard(&error, [&] { throw infinilm::Unsupported(text + "\xe2\x82\xac" + "end"); }), error);
  show(infinilm::guard(&error, [&] { throw infinilm::Unsupported(text + "y" + "end"); }), error);
  error.struct_size = 16;  // of a host that has no message
  error.message[0] = '-';
  show(infinilm::guard(&error, [] { throw infinilm::Unsupported("not written"); }), error);
}

void try_give() {
  auto spec = infinilm::make_struct<infinilm_cache_spec>();
  spec.block_size = 1;
  spec.bytes_per_block = 2;
  spec.bytes_per_slot = 3;
  spec.shareable = 4;
  for (const uint64_t size : {uint64_t{16}, uint64_t{24}, uint64_t{sizeof spec}, uint64_t{4096}}) {
    infinilm_cache_spec out{size, nullptr, -1, -1, -1, -1};
    infinilm::give(&out, spec);
    std::printf("%d %d %d %d %d\n", static_cast<int>(out.struct_size), static_cast<int>(out.block_size),
                static_cast<int>(out.bytes_per_block), static_cast<int>(out.bytes_per_slot),
                static_cast<int>(out.shareable));
  }
}

}  // namespace

int main(int, char **words) {
  const std::string what = words[1];
  const std::string text((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
  auto error = infinilm::make_struct<infinilm_error>();
  const int32_t code = infinilm::guard(&error, [&] {
    if (what == "json") write_json(infinilm::parse_json(text));
    if (what == "strict") read_strictly(text);
    if (what == "guard") try_guard();
    if (what == "give") try_give();
  });
  if (code != INFINILM_OK) std::fprintf(stderr, "%d %s", code, error.message);
  return code;
}
