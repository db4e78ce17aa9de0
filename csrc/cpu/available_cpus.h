// How many threads this process may keep busy: its affinity, and the CPU quota of its cgroups.
#pragma once

#include <string>

namespace infinilm::cpu {

// At least 1.
int available_cpus();

// The CPUs that a cgroup file allows, rounded up; 0 where it sets no limit. `quota` and `period` are the words of
// cpu.max (version 2), or the contents of cpu.cfs_quota_us and cpu.cfs_period_us (version 1).
int quota_cpus(const std::string& quota, const std::string& period);

}  // namespace infinilm::cpu
