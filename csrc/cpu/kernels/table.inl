// The table of one level. Included last.

const Kernels& table() {
  using Bf16 = std::conditional_t<kMultipliesBf16, Bf16Dot, Bf16Widened>;
  static const Kernels kTable = {
      kIsa,        Bf16::kRows,  float_gemm<F32>, float_gemm<Bf16>, int_gemm<Int8>, int_gemm<Int4>, int_gemm<Int4Zero>,
      attend<F32>, attend<Bf16>, to_bf16,         to_i8,            to_i8_pairs,    rms_norm,       layer_norm,
      activate,    activate_pairs, softcap,       rotate,           add,            quantize_i8,    quantize_i4,
  };
  return kTable;
}
