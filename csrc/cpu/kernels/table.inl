// The table of one level. Included last.

const Kernels& table() {
  using Bf16 = std::conditional_t<kMultipliesBf16, Bf16Dot, Bf16Widened>;
  static const Kernels kTable = {
      kIsa,
      Bf16::kRows,
      RowFormat::kF32,
      float_gemm<F32>,
      float_gemm<Bf16>,
      int_gemm<Int8>,
      int_gemm<Int4>,
      int_gemm<Int4Zero>,
      float_gemm<Bf16Widened>,
      nullptr,
      attend<F32, F32>,
      attend<Bf16Widened, Bf16>,
      to_bf16,
      to_bf16_pairs,
      to_i8,
      to_i8_pairs,
      rms_norm,
      layer_norm,
      activate,
      activate_pairs,
      softcap,
      rotate,
      add,
      pack_floats,
      pack_integers<ToInt8>,
      pack_integers<ToInt4>,
  };
  return kTable;
}
