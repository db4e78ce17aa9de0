#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace infinilm::cpu {

namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAvx512Bf16};

bool is_available(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Vnni: return vnni;
    case Isa::kAvx512Bf16: return vnni && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::kScalar;
#endif
}

// Intel's processors begin a product of bf16 pairs every other cycle, and two of floats in each, so that floats widened
// from bf16 are ahead although widening costs: kernel_benchmark has, with 48 rows, 108 GFLOP/s with pairs and 165
// widened on a core of Sapphire Rapids. On AMD's processors nothing was measured: pairs are taken there.
Isa fastest(const std::vector<Isa>& available) {
#if defined(__x86_64__)
  if (available.back() == Isa::kAvx512Bf16 && __builtin_cpu_is("intel")) return Isa::kAvx512Vnni;
#endif
  return available.back();
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Vnni: return "avx512_vnni";
    case Isa::kAvx512Bf16: return "avx512_bf16";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> available;
  for (Isa isa : kAll) {
    if (is_available(isa)) available.push_back(isa);
  }
  return available;
}

Isa chosen_isa() {
  const std::vector<Isa> available = available_isas();
  const char* wanted = std::getenv("INFINILM_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return fastest(available);
  std::string names;
  for (Isa isa : available) {
    if (std::string(wanted) == isa_name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("INFINILM_CPU_ISA is '" + std::string(wanted) + "', and this processor has " + names);
}

}  // namespace infinilm::cpu
