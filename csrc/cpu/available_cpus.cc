#include "available_cpus.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

namespace infinilm::cpu {

namespace {

int affinity_cpus() {
#if defined(__linux__)
  // A mask of the size of cpu_set_t holds 1,024 CPUs; larger machines say EINVAL until there is room enough.
  for (int num_cpus = CPU_SETSIZE; num_cpus <= 1 << 20; num_cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(num_cpus);
    if (set == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(num_cpus);
    const int failed = sched_getaffinity(0, size, set);
    const int count = failed ? 0 : CPU_COUNT_S(size, set);
    CPU_FREE(set);
    if (count > 0) return count;
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::string first_word(const std::string& path) {
  std::string word;
  std::ifstream(path) >> word;
  return word;
}

int cgroup_v2_cpus(const std::string& directory) {
  std::string quota, period;
  std::ifstream(directory + "/cpu.max") >> quota >> period;
  return quota_cpus(quota, period);
}

int cgroup_v1_cpus(const std::string& directory) {
  return quota_cpus(first_word(directory + "/cpu.cfs_quota_us"), first_word(directory + "/cpu.cfs_period_us"));
}

// The smallest limit from `path` up to the root of the hierarchy mounted at `mount`; every ancestor's holds as well.
int smallest_limit(const std::string& mount, std::string path, int (*limit)(const std::string&)) {
  int smallest = 0;
  for (;;) {
    const int found = limit(mount + (path == "/" ? "" : path));
    if (found > 0) smallest = smallest > 0 ? std::min(smallest, found) : found;
    if (path.empty() || path == "/") return smallest;
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
}

int cgroup_cpus() {
  int smallest = 0;
  std::ifstream memberships("/proc/self/cgroup");
  for (std::string line; std::getline(memberships, line);) {  // "4:cpu,cpuacct:/path" or "0::/path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    int found = 0;
    if (controllers == ",,") {
      found = smallest_limit("/sys/fs/cgroup", path, cgroup_v2_cpus);
    } else if (controllers.find(",cpu,") != std::string::npos) {
      found = smallest_limit("/sys/fs/cgroup/cpu", path, cgroup_v1_cpus);
    }
    if (found > 0) smallest = smallest > 0 ? std::min(smallest, found) : found;
  }
  return smallest;
}

}  // namespace

int quota_cpus(const std::string& quota, const std::string& period) {
  const long quota_us = std::atol(quota.c_str()), period_us = std::atol(period.c_str());  // "max" and "" are 0
  if (quota_us <= 0 || period_us <= 0) return 0;
  return static_cast<int>((quota_us + period_us - 1) / period_us);
}

int available_cpus() {
  const int by_affinity = affinity_cpus(), by_quota = cgroup_cpus();
  return by_quota > 0 ? std::min(by_affinity, by_quota) : by_affinity;
}

}  // namespace infinilm::cpu
