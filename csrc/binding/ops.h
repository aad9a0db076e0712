// The ops, as torch calls them; register.cpp has their schemas.
#pragma once

#include <cstdint>
#include <tuple>

#include "check.h"

namespace sliderquant::binding {

Tensor wna16_gemm(const Tensor& x, const Tensor& w_packed, const Tensor& scale, const Optional& zero,
                  const Optional& bias, int64_t bits, int64_t group_size);
Tensor wna16_gemm_grouped(const Tensor& x, const Tensor& offsets, const Tensor& w_packed, const Tensor& scale,
                          const Optional& zero, const Optional& bias, int64_t bits, int64_t group_size);
Tensor w4a4_gemm(const Tensor& codes, const Tensor& sa, const Tensor& za, const Tensor& row_sum,
                 const Tensor& w_packed, const Tensor& sw, const Optional& zw, const Tensor& col_sum,
                 const Optional& bias, int64_t weight_bits, ScalarType out_dtype);
Tensor w4a4_gemm_grouped(const Tensor& codes, const Tensor& sa, const Tensor& za, const Tensor& row_sum,
                         const Tensor& offsets, const Tensor& w_packed, const Tensor& sw, const Optional& zw,
                         const Tensor& col_sum, const Optional& bias, int64_t weight_bits, ScalarType out_dtype);

// -> kernel layout, as check_weight expects it.
Tensor repack(const Tensor& weight_packed, int64_t bits, int64_t activation_bits);

Tensor column_sums(const Tensor& weight_packed, int64_t bits);

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x, int64_t bits, bool symmetric,
                                                              int64_t block);

// x and residual [M, K], weight [K] -> the same of their normalized sum, and the sum, which is empty without a residual
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Optional& residual,
                                                                     const Tensor& weight, double epsilon,
                                                                     int64_t bits, bool symmetric, int64_t block);

// x [M, 2 * K], gates before ups -> the same of silu(gate) * up
std::tuple<Tensor, Tensor, Tensor, Tensor> silu_mul_quantize(const Tensor& x, int64_t bits, bool symmetric,
                                                             int64_t block);

Tensor hadamard(const Tensor& x, int64_t block);

// weight fp32 [N, K], scale and zero fp32 [N, G] -> quantized fp32 and error int16, both [N, K]
std::tuple<Tensor, Tensor> fake_quantize_weight(const Tensor& weight, const Tensor& scale, const Tensor& zero,
                                                int64_t max_code);

// grad fp32 and error int16 [N, K] -> gradient of the weight fp32 [N, K], sums fp32 [3, N, G]
std::tuple<Tensor, Tensor> fake_quantize_weight_backward(const Tensor& grad, const Tensor& error, int64_t groups);

}  // namespace sliderquant::binding
