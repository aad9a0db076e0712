// Fake quantization of weights while calibrating, and its gradient.
#include <cstdint>
#include <string>
#include <tuple>

#include "ops.h"
#include "run.h"

namespace sliderquant::binding {

// weight fp32 [N, K], scale and zero fp32 [N, G] -> quantized fp32 and error int16, both [N, K]
std::tuple<Tensor, Tensor> fake_quantize_weight(const Tensor& weight, const Tensor& scale, const Tensor& zero,
                                                int64_t max_code) {
  const char* op = "fake_quantize_weight";
  if (weight.dim() != 2 || weight.size(1) == 0) fail(op, "weight: expected float32 [N, K]; got ", describe(weight));
  if (scale.dim() != 2 || scale.size(1) == 0) fail(op, "scale: expected float32 [N, G]; got ", describe(scale));
  if (max_code < 1 || max_code > 255) fail(op, "max_code: expected 1 to 255; got ", max_code);
  const int64_t n = weight.size(0), k = weight.size(1), groups = scale.size(1);
  if (k % groups != 0) fail(op, "scale: expected groups that divide K=", k, "; got ", describe(scale));
  const Expectation e = {op, " for N=" + std::to_string(n) + ", K=" + std::to_string(k), weight};
  check(e, "weight", weight, ScalarType::Float, {n, k});
  check(e, "scale", scale, ScalarType::Float, {n, groups});
  check(e, "zero", zero, ScalarType::Float, {n, groups});
  const Tensor quantized = torch::stable::new_empty(weight, {n, k});
  const Tensor error = torch::stable::new_empty(weight, {n, k}, ScalarType::Short);
  cpu::kernels().fake_quantize(
      {
          .weight = data<float>(weight),
          .scale = data<float>(scale),
          .zero = data<float>(zero),
          .quantized = static_cast<float*>(quantized.mutable_data_ptr()),
          .error = static_cast<int16_t*>(error.mutable_data_ptr()),
          .groups = n * groups,
          .size = k / groups,
          .max_code = static_cast<int>(max_code),
      },
      run_parallel);
  return {quantized, error};
}

// grad fp32 and error int16 [N, K] -> gradient of the weight fp32 [N, K], sums fp32 [3, N, G]
std::tuple<Tensor, Tensor> fake_quantize_weight_backward(const Tensor& grad, const Tensor& error, int64_t groups) {
  const char* op = "fake_quantize_weight_backward";
  if (grad.dim() != 2 || grad.size(1) == 0) fail(op, "grad: expected float32 [N, K]; got ", describe(grad));
  const int64_t n = grad.size(0), k = grad.size(1);
  if (groups < 1 || k % groups != 0) fail(op, "groups: expected a divisor of K=", k, "; got ", groups);
  const Expectation e = {op, " for N=" + std::to_string(n) + ", K=" + std::to_string(k), grad};
  check(e, "grad", grad, ScalarType::Float, {n, k});
  check(e, "error", error, ScalarType::Short, {n, k});
  const Tensor grad_weight = torch::stable::new_empty(grad, {n, k});
  const Tensor sums = torch::stable::new_empty(grad, {3, n, groups});
  cpu::kernels().fake_quantize_backward(
      {
          .grad = data<float>(grad),
          .error = data<int16_t>(error),
          .grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr()),
          .sums = static_cast<float*>(sums.mutable_data_ptr()),
          .groups = n * groups,
          .size = k / groups,
      },
      run_parallel);
  return {grad_weight, sums};
}

}  // namespace sliderquant::binding
