#include "library.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <map>
#include <tuple>
#include <utility>

#include "model.hpp"

namespace infinilm::host {
namespace {

using FileKey = std::pair<uint64_t, uint64_t>;  // device, inode
using FileState = std::tuple<uint64_t, uint64_t, int64_t, int64_t, int64_t>;  // and size, seconds, nanoseconds

const std::string kOurAbi = std::to_string(INFINILM_ABI_MAJOR) + "." + std::to_string(INFINILM_ABI_MINOR);
constexpr uint64_t kHeadSize = offsetof(infinilm_backend_table, build) + sizeof(const char *);
constexpr std::size_t kNameLimit = 64, kTextLimit = 512, kReasonLimit = 8192;
constexpr int kRefusalLimit = 256;

struct Registry {
  std::mutex mutex;
  std::map<FileKey, std::shared_ptr<Library>> libraries;
  std::vector<std::shared_ptr<Library>> in_order;
  // Files that are mapped for good, though refused: their inodes cannot become other files.
  std::map<FileKey, Refusal> refused_mapped;
  std::map<FileState, Refusal> refused_files;
  std::vector<Refusal> refusals;
  std::vector<std::unique_ptr<HostTable>> kept;
  std::string poisoned;  // the file whose static constructor threw
  bool is_over = false;
};

Registry &registry() {
  static auto *made = new Registry;  // never destroyed: threads may outlive static destructors
  return *made;
}

std::string describe(const Refusal &refusal) {
  std::string text = "backend library '" + refusal.path + "' is refused at stage '" + refusal.stage + "': ";
  text += refusal.reason;
  const std::string found = refusal.abi_found.empty() ? "not known" : refusal.abi_found;
  return text + " (ABI found: " + found + ", wanted: " + refusal.abi_wanted + ")";
}

[[noreturn]] void refuse(const std::string &path, const char *stage, const std::string &reason,
                         const std::string &abi_found = "") {
  throw Refused(Refusal{clean_text(path.c_str(), PATH_MAX), stage, clean_text(reason.c_str(), kReasonLimit), abi_found, std::to_string(INFINILM_ABI_MAJOR) + ".x"});
}

// ---------------------------------------------------------------- find and read

struct File {
  std::string path;
  FileKey key;
  FileState state;
};

File find_file(const std::string &path) {
  if (path.find('\0') != std::string::npos) refuse(path.c_str(), "find", "the path has a zero byte in it");
  struct Freed {
    void operator()(char *pointer) const { std::free(pointer); }
  };
  const std::unique_ptr<char, Freed> resolved(realpath(path.c_str(), nullptr));
  struct stat found;
  if (resolved == nullptr || stat(resolved.get(), &found) != 0) {
    const int reason = errno;
    refuse(path, "find", std::string(std::strerror(reason)) + "; give the path of a shared library (.so)");
  }
  if (S_ISDIR(found.st_mode)) refuse(resolved.get(), "find", "it is a directory; give the path of a shared library in it");
  if (!S_ISREG(found.st_mode)) refuse(resolved.get(), "find", "it is no regular file");
  const FileKey key{found.st_dev, found.st_ino};
#ifdef __APPLE__
  const auto modified = found.st_mtimespec;
#else
  const auto modified = found.st_mtim;
#endif
  return {resolved.get(), key, {key.first, key.second, found.st_size, modified.tv_sec, modified.tv_nsec}};
}

#ifdef __linux__
constexpr int kMachine =
#if defined(__x86_64__)
    62;
#elif defined(__aarch64__)
    183;
#elif defined(__riscv) && __riscv_xlen == 64
    243;
#elif defined(__loongarch64)
    258;
#else
    0;
#endif

// Looks at the head of an ELF file (System V ABI, chapter 4): the linker's own words for a wrong one are few.
void require_elf(const std::string &path) {
  std::array<unsigned char, 20> head{};
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) refuse(path, "read", std::strerror(errno));
  const ssize_t size = read(file, head.data(), head.size());
  const int failed = errno;
  close(file);
  if (size < 0) refuse(path, "read", std::strerror(failed));
  if (size == 0) refuse(path, "read", "the file is empty; build it again");
  if (static_cast<std::size_t>(size) < head.size() || std::memcmp(head.data(), "\177ELF", 4) != 0) {
    auto shown = clean_text(reinterpret_cast<const char *>(head.data()), std::min<std::size_t>(size, 8));
    std::replace_if(shown.begin(), shown.end(), [](unsigned char c) { return c < 0x20; }, '?');
    refuse(path, "read", "it is no ELF file, it begins with '" + shown + "'; give the path of a shared library (.so)");
  }
  const int machine = head[18] | head[19] << 8;
  if (head[4] != 2 || head[5] != 1 || (kMachine != 0 && machine != kMachine)) {
    refuse(path, "read",
           "it was built for another kind of machine: ELF class " + std::to_string(head[4]) + ", machine " +
               std::to_string(machine) + ", and this process is class 2, machine " + std::to_string(kMachine) +
               "; build it for this one");
  }
}
#else
void require_elf(const std::string &) {}
#endif

// ---------------------------------------------------------------- open and table

struct Slot {
  const char *name;
  std::size_t offset;
};

#define INFINILM_SLOT(name) {#name, offsetof(infinilm_backend_table, name)}
constexpr Slot kRequired[] = {
    INFINILM_SLOT(probe),          INFINILM_SLOT(create),           INFINILM_SLOT(destroy),
    INFINILM_SLOT(supports_model), INFINILM_SLOT(model_create),     INFINILM_SLOT(model_destroy),
    INFINILM_SLOT(num_parameters), INFINILM_SLOT(parameter),        INFINILM_SLOT(open_parameter),
    INFINILM_SLOT(close_parameter), INFINILM_SLOT(loading_done),    INFINILM_SLOT(cache_spec),
    INFINILM_SLOT(cache_create),   INFINILM_SLOT(cache_copy_blocks), INFINILM_SLOT(cache_destroy),
    INFINILM_SLOT(forward),
};
#undef INFINILM_SLOT

const infinilm_backend_table *open_table(const std::string &path, bool &is_mapped) {
  void *handle = nullptr;
  void *(*volatile opener)(const char *, int) = dlopen;  // declared to throw nothing, which is not so
  try {
    handle = opener(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  } catch (...) {
    is_mapped = true;
    registry().poisoned = path;
    refuse(path, "open",
           "a static constructor threw an exception, and the dynamic linker's lock may never be free again: end this "
           "process, and let the library construct nothing before its entry is called");
  }
  if (handle == nullptr) {
    const char *words = dlerror();
    refuse(path, "open", std::string("the dynamic linker says: ") + (words == nullptr ? "nothing" : words));
  }
  dlerror();
  void *symbol = dlsym(handle, INFINILM_BACKEND_ENTRY);
  if (symbol == nullptr) {
    dlclose(handle);
    refuse(path, "entry",
           "it does not export " INFINILM_BACKEND_ENTRY "; declare it with INFINILM_EXPORT, as infinilm/backend.h does");
  }
  is_mapped = true;
  infinilm_backend_entry_function entry;
  static_assert(sizeof entry == sizeof symbol, "POSIX: a function's address fits a void pointer");
  std::memcpy(&entry, &symbol, sizeof entry);
  try {
    return entry(INFINILM_ABI_MAJOR, INFINILM_ABI_MINOR);
  } catch (...) {
    refuse(path, "entry", INFINILM_BACKEND_ENTRY " let an exception through; it must be a function that returns a table");
  }
}

std::string hexadecimal(uint64_t number) {
  std::string text;
  for (int shift = 60; shift >= 0; shift -= 4) text += "0123456789abcdef"[number >> shift & 15];
  return "0x" + text;
}

void check_table(const std::string &path, const infinilm_backend_table *table) {
  const std::string remedy = "; build it against the headers of this version, infinilm.get_include()";
  if (table == nullptr) refuse(path, "table", "it has none for a host of ABI " + kOurAbi + remedy);
  if (table->magic != INFINILM_BACKEND_MAGIC) {
    refuse(path, "table", "its magic number is " + hexadecimal(table->magic) + ", and not " +
                              hexadecimal(INFINILM_BACKEND_MAGIC) + remedy);
  }
  const std::string found = std::to_string(table->abi_major) + "." + std::to_string(table->abi_minor);
  if (table->abi_major != INFINILM_ABI_MAJOR) {
    refuse(path, "table",
           "it was built for ABI " + found + ", and this infinilm " INFINILM_VERSION " has ABI " + kOurAbi +
               (table->abi_major > INFINILM_ABI_MAJOR ? "; take a newer infinilm, or build it against the headers of this"
                                                      : "; ask for a newer build of it, or take an older infinilm"),
           found);
  }
  if (table->struct_size < kHeadSize) {
    refuse(path, "table", "it says that it has " + std::to_string(table->struct_size) + " bytes, and its head alone has " +
                              std::to_string(kHeadSize) + remedy, found);
  }
  for (const Slot &slot : kRequired) {
    const bool is_there = table->struct_size >= slot.offset + sizeof(void *);
    void *function = nullptr;
    if (is_there) std::memcpy(&function, reinterpret_cast<const char *>(table) + slot.offset, sizeof function);
    if (function == nullptr) {
      refuse(path, "table", std::string("the function ") + slot.name + " is missing, and every backend needs it", found);
    }
  }
}

void check_name(const std::string &path, const infinilm_backend_table *table, const std::string &abi) {
  const std::string name = clean_text(table->name, kNameLimit + 1);
  const bool is_fit = !name.empty() && name.size() <= kNameLimit && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
  });
  if (!is_fit) {
    refuse(path, "name", "it calls itself '" + name + "'; letters, digits, '-', '_' and '.' are allowed, at most 64", abi);
  }
  for (const auto &other : registry().in_order) {
    if (other->name != name) continue;
    refuse(path, "name",
           other->path == path
               ? "an older version of this file is loaded as '" + name + "' and stays; start a new process"
               : "it is called '" + name + "', and so is '" + other->path + "', which is loaded; give one another name",
           abi);
  }
}

std::shared_ptr<Library> make_library(const std::string &path, const infinilm_backend_table *table) {
  auto library = std::make_shared<Library>();
  library->path = path;
  library->table = table;
  library->name = clean_text(table->name, kNameLimit);
  library->version = clean_text(table->version, kTextLimit);
  library->build = clean_text(table->build, kTextLimit);
  library->abi = std::to_string(table->abi_major) + "." + std::to_string(table->abi_minor);
  library->host = std::make_unique<HostTable>(library->name);
  const infinilm_host *host = &library->host->table;
  try {
    checked("probe", [&](infinilm_error *error) { return table->probe(host, error); });
  } catch (const Failure &failure) {
    registry().kept.push_back(std::move(library->host));  // the library may have kept it, against the rules
    refuse(path, "probe", failure.what(), library->abi);
  }
  try {
    checked("create", [&](infinilm_error *error) { return table->create(host, "{}", &library->backend, error); });
    if (library->backend == nullptr) throw Failure(INFINILM_FAILED, "create returned INFINILM_OK and no backend");
  } catch (const Failure &failure) {
    registry().kept.push_back(std::move(library->host));
    refuse(path, "create", failure.what(), library->abi);
  }
  library->is_concurrent = library->query(INFINILM_QUERY_CONCURRENT) != 0;
  return library;
}

void remember(Registry &all, const Refusal &refusal) {
  const auto is_same = [&](const Refusal &other) { return other.path == refusal.path; };
  all.refusals.erase(std::remove_if(all.refusals.begin(), all.refusals.end(), is_same), all.refusals.end());
  if (all.refusals.size() >= kRefusalLimit) all.refusals.erase(all.refusals.begin());
  all.refusals.push_back(refusal);
}

std::shared_ptr<Library> load_locked(Registry &all, const std::string &path) {
  const File file = find_file(path);
  if (const auto known = all.libraries.find(file.key); known != all.libraries.end()) return known->second;
  if (const auto known = all.refused_mapped.find(file.key); known != all.refused_mapped.end()) {
    throw Refused(known->second);
  }
  if (const auto known = all.refused_files.find(file.state); known != all.refused_files.end()) {
    throw Refused(known->second);
  }
  if (all.is_over) refuse(file.path, "open", "this process is ending");
  if (!all.poisoned.empty()) {
    refuse(file.path, "open", "a static constructor of '" + all.poisoned + "' threw an exception before, and the dynamic "
                              "linker cannot be used any more; start a new process without that library");
  }
  bool is_mapped = false;
  try {
    require_elf(file.path);
    const infinilm_backend_table *table = open_table(file.path, is_mapped);
    check_table(file.path, table);
    check_name(file.path, table, std::to_string(table->abi_major) + "." + std::to_string(table->abi_minor));
    auto library = make_library(file.path, table);
    all.libraries[file.key] = library;
    all.in_order.push_back(library);
    const auto is_same = [&](const Refusal &other) { return other.path == library->path; };
    all.refusals.erase(std::remove_if(all.refusals.begin(), all.refusals.end(), is_same), all.refusals.end());
    return library;
  } catch (const Refused &refused) {
    if (is_mapped) {
      all.refused_mapped.emplace(file.key, refused.refusal());
    } else {
      all.refused_files.emplace(file.state, refused.refusal());
    }
    throw;
  }
}

}  // namespace

Refused::Refused(Refusal refusal) : std::runtime_error(describe(refusal)), refusal_(std::move(refusal)) {}

std::shared_ptr<Library> load_library(const std::string &path) {
  Registry &all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  try {
    return load_locked(all, path);
  } catch (const Refused &refused) {
    remember(all, refused.refusal());
    throw;
  }
}

std::vector<std::shared_ptr<Library>> loaded_libraries() {
  Registry &all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.in_order;
}

std::vector<Refusal> refusals() {
  Registry &all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.refusals;
}

void shut_down(int64_t timeout_ms) {
  set_aborted();
  {
    Registry &all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.is_over = true;
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  for (const auto &library : loaded_libraries()) {
    bool is_idle = true;
    for (const auto &model : library->models()) {
      model->cancel();
      is_idle = model->destroy_until(deadline) && is_idle;
    }
    if (!is_idle) continue;
    const std::unique_lock<std::mutex> lock = lock_until(library->calls, deadline);
    if (!lock.owns_lock() || library->num_models != 0 || library->backend == nullptr) continue;
    library->table->destroy(std::exchange(library->backend, nullptr));
  }
}

// ---------------------------------------------------------------- calls on a library

int64_t Library::query(const std::string &what) {
  if (!INFINILM_COVERS(table, infinilm_backend_table, query) || table->query == nullptr) return 0;
  const std::lock_guard<std::mutex> lock(calls);
  int64_t value = 0;
  try {
    checked("query", [&](infinilm_error *error) { return table->query(backend, what.c_str(), &value, error); });
  } catch (const Failure &failure) {
    if (failure.code() == INFINILM_UNSUPPORTED) return 0;
    throw;
  }
  return value;
}

infinilm_memory Library::memory() {
  if (!INFINILM_COVERS(table, infinilm_backend_table, memory) || table->memory == nullptr) {
    throw Failure(INFINILM_UNSUPPORTED, "backend '" + name + "' does not say what memory it holds");
  }
  infinilm_memory memory;
  std::memset(&memory, 0, sizeof memory);
  memory.struct_size = sizeof memory;
  const std::lock_guard<std::mutex> lock(calls);
  checked("memory", [&](infinilm_error *error) { return table->memory(backend, &memory, error); });
  return memory;
}

void Library::require_support(const infinilm_model_request &request) {
  const std::lock_guard<std::mutex> lock(calls);
  if (backend == nullptr) throw Failure(INFINILM_UNAVAILABLE, "backend '" + name + "' is shut down");
  checked("supports_model", [&](infinilm_error *error) { return table->supports_model(backend, &request, error); });
}

void Library::add(const std::shared_ptr<Model> &model) {
  const std::lock_guard<std::mutex> lock(members_);
  const auto is_gone = [](const std::weak_ptr<Model> &other) { return other.expired(); };
  models_.erase(std::remove_if(models_.begin(), models_.end(), is_gone), models_.end());
  models_.push_back(model);
}

std::vector<std::shared_ptr<Model>> Library::models() {
  const std::lock_guard<std::mutex> lock(members_);
  std::vector<std::shared_ptr<Model>> living;
  for (const auto &model : models_) {
    if (auto held = model.lock()) living.push_back(std::move(held));
  }
  return living;
}

}  // namespace infinilm::host
