#include "isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace infinilm::cpu {

namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAvx512Bf16,
                        Isa::kAvx512Amx};

#if defined(__x86_64__)

// CPUID's registers for a leaf, zero where there is no such leaf. The compiler's __builtin_cpu_supports would bring a
// static initializer along.
struct CpuId {
  explicit CpuId(uint32_t leaf, uint32_t subleaf = 0) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

bool has(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }

// The registers that the system saves when it switches between threads.
uint32_t saved_registers() {
  if (!has(CpuId(1).ecx, bit_OSXSAVE)) return 0;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux keeps the tiles of a process only once it has asked, because they make the state of a thread 8 KiB larger.
bool may_use_tiles() {
#if defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool is_intel() {
  const CpuId vendor(0);
  return vendor.ebx == signature_INTEL_ebx && vendor.ecx == signature_INTEL_ecx && vendor.edx == signature_INTEL_edx;
}

#endif

bool is_available(Isa isa) {
#if defined(__x86_64__)
  constexpr uint32_t kSavesAvx = 0x6, kSavesAvx512 = 0xe6, kSavesTiles = 0x60000, kBf16 = 1 << 5;
  constexpr uint32_t kTiles = 1 << 24, kTilesOfBf16 = 1 << 22;
  const CpuId basic(1), extended(7), more(7, 1);
  const bool avx2 = has(saved_registers(), kSavesAvx) && has(basic.ecx, bit_FMA | bit_F16C | bit_AVX) &&
                    has(extended.ebx, bit_AVX2);
  const bool avx512 = avx2 && has(saved_registers(), kSavesAvx512) &&
                      has(extended.ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL);
  const bool vnni = avx512 && has(extended.ecx, bit_AVX512VNNI);
  const bool bf16 = vnni && has(more.eax, kBf16);
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Vnni: return vnni;
    case Isa::kAvx512Bf16: return bf16;
    case Isa::kAvx512Amx:
      return bf16 && has(saved_registers(), kSavesTiles) && has(extended.edx, kTiles | kTilesOfBf16) && may_use_tiles();
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
  if (available.back() == Isa::kAvx512Bf16 && is_intel()) return Isa::kAvx512Vnni;
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
    case Isa::kAvx512Amx: return "avx512_amx";
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
