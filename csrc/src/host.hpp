// What the host offers to libraries: the log, memory, threads for setting up, and whether the process ends.
#pragma once

#include <atomic>
#include <string>

#include "infinilm/backend.h"

#ifndef INFINILM_VERSION
#define INFINILM_VERSION "unknown"
#endif

namespace infinilm::host {

using LogSink = void (*)(const char *library, int32_t level, const char *message);

// Where libraries' words go; without one, to stderr.
void set_log_sink(LogSink sink);

// Have every library see that the process wants its work to end.
void set_aborted();
bool is_aborted();

// The table of one library; `name` is what its log lines are called by. It lives as long as the process.
struct HostTable {
  infinilm_host table;
  std::string library;
  explicit HostTable(std::string name);
  HostTable(const HostTable &) = delete;
  HostTable &operator=(const HostTable &) = delete;
};

}  // namespace infinilm::host
