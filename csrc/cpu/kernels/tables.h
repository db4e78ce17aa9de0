// The tables of kernels that were compiled, each from the same templates for another level of Isa.
#pragma once

#include "kernels/kernels.h"

namespace infinilm::cpu {

namespace baseline {
const Kernels& table();
}
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
namespace avx512_vnni {
const Kernels& table();
}
namespace avx512_bf16 {
const Kernels& table();
}
namespace avx512_amx {
const Kernels& table();
}

}  // namespace infinilm::cpu
