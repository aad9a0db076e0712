// The ops' schemas, and which functions implement them.
#include <torch/csrc/stable/library.h>

#include "binding/ops.h"

namespace {

using namespace sliderquant::binding;

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("wna16_gemm", TORCH_BOX(&wna16_gemm));
  library.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  library.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  library.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize));
  library.impl("hadamard", TORCH_BOX(&hadamard));
  library.impl("w4a4_gemm", TORCH_BOX(&w4a4_gemm));
  library.impl("wna16_gemm_grouped", TORCH_BOX(&wna16_gemm_grouped));
  library.impl("w4a4_gemm_grouped", TORCH_BOX(&w4a4_gemm_grouped));
  library.impl("repack", TORCH_BOX(&repack));
}

}  // namespace

STABLE_TORCH_LIBRARY(sliderquant, library) {
  library.def(
      "wna16_gemm(Tensor x, Tensor w_packed, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size) "
      "-> Tensor");
  library.def(
      "quantize_per_token(Tensor x, int bits, bool symmetric, int block_size=1) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "rms_norm_quantize(Tensor x, Tensor? residual, Tensor weight, float epsilon, int bits, bool symmetric, "
      "int block_size=1) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "silu_mul_quantize(Tensor x, int bits, bool symmetric, int block_size=1) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("hadamard(Tensor x, int block_size) -> Tensor");
  library.def(
      "w4a4_gemm(Tensor codes, Tensor sa, Tensor za, Tensor row_sum, Tensor w_packed, Tensor sw, Tensor? zw, "
      "Tensor col_sum, Tensor? bias, int weight_bits, ScalarType out_dtype) -> Tensor");
  library.def(
      "wna16_gemm_grouped(Tensor x, Tensor offsets, Tensor w_packed, Tensor scale, Tensor? zero, Tensor? bias, "
      "int bits, int group_size) -> Tensor");
  library.def(
      "w4a4_gemm_grouped(Tensor codes, Tensor sa, Tensor za, Tensor row_sum, Tensor offsets, Tensor w_packed, "
      "Tensor sw, Tensor? zw, Tensor col_sum, Tensor? bias, int weight_bits, ScalarType out_dtype) -> Tensor");
  library.def("repack(Tensor weight_packed, int bits, int activation_bits) -> Tensor");
  library.def("column_sums(Tensor weight_packed, int bits) -> Tensor");
  library.def("fake_quantize_weight(Tensor weight, Tensor scale, Tensor zero, int max_code) -> (Tensor, Tensor)");
  library.def("fake_quantize_weight_backward(Tensor grad, Tensor error, int groups) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sliderquant, CPU, library) {
  implement(library);
  library.impl("column_sums", TORCH_BOX(&column_sums));
  library.impl("fake_quantize_weight", TORCH_BOX(&fake_quantize_weight));
  library.impl("fake_quantize_weight_backward", TORCH_BOX(&fake_quantize_weight_backward));
}

#ifdef SLIDERQUANT_CUDA
STABLE_TORCH_LIBRARY_IMPL(sliderquant, CUDA, library) { implement(library); }
#endif
