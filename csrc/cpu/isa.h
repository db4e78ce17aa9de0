// Which instructions the kernels may use: found out once by CPUID, lowered for tests by INFINILM_CPU_ISA.
#pragma once

#include <string>
#include <vector>

namespace infinilm::cpu {

// Each level includes those before it. Scalar is whatever the compiler's baseline has.
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAvx512Amx };

const char* isa_name(Isa isa);

// Every level this processor and its system can run, lowest first.
std::vector<Isa> available_isas();

// The fastest available level, or the one that INFINILM_CPU_ISA names. Throws std::invalid_argument where that is no
// level or not available.
Isa chosen_isa();

}  // namespace infinilm::cpu
