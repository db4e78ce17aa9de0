// Opening backend libraries: found, read, opened, asked for their table, probed, and created, once a process.
//
// Knows no Python. A library is keyed by the file it is, not by what that is called, is opened with RTLD_LOCAL, and is
// never closed once its entry has run. Refusals are remembered with the stage they came at.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "call.hpp"
#include "host.hpp"

namespace infinilm::host {

// Why a library is not used. `stage` is "find", "read", "open", "entry", "table", "name", "probe" or "create"; the
// versions are "" where it did not come so far as to say one.
struct Refusal {
  std::string path;
  std::string stage;
  std::string reason;
  std::string abi_found;
  std::string abi_wanted;
};

class Refused : public std::runtime_error {
 public:
  explicit Refused(Refusal refusal);
  const Refusal &refusal() const noexcept { return refusal_; }

 private:
  Refusal refusal_;
};

class Model;

// A library that may be used. It lives as long as the process.
class Library {
 public:
  std::string path;  // of the file, links resolved
  std::string name;
  std::string version;
  std::string build;
  std::string abi;  // "1.0"
  const infinilm_backend_table *table = nullptr;
  infinilm_backend *backend = nullptr;
  std::unique_ptr<HostTable> host;
  bool is_concurrent = false;  // whether calls on different models may overlap
  std::mutex calls;      // held while a call runs
  std::atomic<int> num_models{0};

  // Returns the answer to an INFINILM_QUERY_ name, 0 where the library does not know it.
  int64_t query(const std::string &name);
  // Throws Failure where the library does not know.
  infinilm_memory memory();
  // Throws Failure, INFINILM_UNSUPPORTED with the reason.
  void require_support(const infinilm_model_request &request);

  // The models there are, for the end of the process.
  void add(const std::shared_ptr<Model> &model);
  std::vector<std::shared_ptr<Model>> models();

 private:
  std::mutex members_;
  std::vector<std::weak_ptr<Model>> models_;
};

// Opens the library at `path`, or returns the one that file is already. Throws Refused. Any thread may call it.
std::shared_ptr<Library> load_library(const std::string &path);

std::vector<std::shared_ptr<Library>> loaded_libraries();
std::vector<Refusal> refusals();

// Ends what runs, and destroys models and backends, but for those that are still busy `timeout_ms` later. Nothing is
// loaded afterwards.
void shut_down(int64_t timeout_ms);

}  // namespace infinilm::host
