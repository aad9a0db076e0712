// What is done to each token: quantization, alone and behind other steps, and the Hadamard transform.
#include <cstdint>
#include <string>
#include <tuple>

#include "ops.h"
#include "run.h"

namespace sliderquant::binding {
namespace {

void check_block(const char* op, const Tensor& x, int64_t block, int64_t k) {
  if (block < 1 || (block & (block - 1)) != 0 || k % block != 0) {
    fail(op, "block_size: expected a power of 2 that divides K=", k, "; got ", block);
  }
  if (block > layout::kMostBlock && !x.device().is_cpu()) {
    fail(op, "block_size: expected at most ", layout::kMostBlock, " on GPUs; got ", block);
  }
}

// What a quantizer of rows returns, and what it is told; x is [m, k], or [m, 2 * k] where it holds gates and ups.
struct Quantized {
  Tensor codes, scale, zero, row_sum;
  Quantize args;

  Quantized(const char* op, const Tensor& x, int64_t k, int64_t bits, bool symmetric, int64_t block)
      : codes(torch::stable::new_empty(x, {x.size(0), k}, ScalarType::Byte)),
        scale(torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float)),
        zero(torch::stable::new_empty(x, {x.size(0)}, ScalarType::Int)),
        row_sum(torch::stable::new_empty(x, {x.size(0)}, ScalarType::Int)) {
    if (bits < 2 || bits > 8) fail(op, "bits: expected 2 to 8; got ", bits);
    check_block(op, x, block, k);
    args = {
        .x = data<uint16_t>(x),
        .x_type = check_input(op, x),
        .x_stride = x.stride(0),
        .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
        .scale = static_cast<float*>(scale.mutable_data_ptr()),
        .zero = static_cast<int32_t*>(zero.mutable_data_ptr()),
        .row_sum = static_cast<int32_t*>(row_sum.mutable_data_ptr()),
        .m = x.size(0),
        .k = k,
        .block = block,
        .bits = static_cast<int>(bits),
        .symmetric = symmetric,
    };
  }
};

// The channels of x, [M, K] or [M, 2 * K].
int64_t check_rows(const char* op, const Tensor& x, bool gated) {
  check_input(op, x);
  const int64_t k = x.size(1);
  if (k > INT32_MAX) fail(op, "x: expected fewer than 2^31 columns; got ", describe(x));
  if (gated && k % 2 != 0) fail(op, "x: expected [M, 2 * K]; got ", describe(x));
  if (k <= 0) fail(op, "x: expected at least one column; got ", describe(x));
  return gated ? k / 2 : k;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x, int64_t bits, bool symmetric,
                                                              int64_t block) {
  const char* op = "quantize_per_token";
  const Quantized made(op, x, check_rows(op, x, false), bits, symmetric, block);
  if (x.size(0) > 0) {
    if (x.device().is_cpu()) {
      cpu::kernels().quantize(made.args, run_parallel);
    } else {
      run_cuda(op, made.args, x.device().index(), SLIDERQUANT_LAUNCH(quantize));
    }
  }
  return {made.codes, made.scale, made.zero, made.row_sum};
}

// x and residual [M, K], weight [K] -> the same of their normalized sum, and the sum, which is empty without a residual
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Optional& residual,
                                                                     const Tensor& weight, double epsilon,
                                                                     int64_t bits, bool symmetric, int64_t block) {
  const char* op = "rms_norm_quantize";
  const int64_t m = x.dim() == 2 ? x.size(0) : 0, k = check_rows(op, x, false);
  const Expectation e = {op, " for K=" + std::to_string(k), x};
  check(e, "weight", weight, x.scalar_type(), {k});
  if (residual.has_value()) {
    const auto& r = *residual;
    if (r.dim() != 2 || r.size(0) != m || r.size(1) != k || r.scalar_type() != x.scalar_type() ||
        r.device() != x.device() || (k > 1 && r.stride(1) != 1)) {
      fail(op, "residual: expected ", describe(x), " like x, with unit stride along K; got ", describe(r));
    }
  }
  const Quantized made(op, x, k, bits, symmetric, block);
  const Tensor sum = torch::stable::new_empty(x, {residual.has_value() ? m : 0, k});
  if (m > 0) {
    const RmsNormQuantize args = {
        .quantize = made.args,
        .residual = data<uint16_t>(residual),
        .residual_stride = residual.has_value() ? residual->stride(0) : 0,
        .sum = static_cast<uint16_t*>(sum.mutable_data_ptr()),
        .weight = data<uint16_t>(weight),
        .epsilon = static_cast<float>(epsilon),
    };
    if (x.device().is_cpu()) {
      cpu::kernels().rms_norm_quantize(args, run_parallel);
    } else {
      run_cuda(op, args, x.device().index(), SLIDERQUANT_LAUNCH(rms_norm_quantize));
    }
  }
  return {made.codes, made.scale, made.zero, made.row_sum, sum};
}

// x [M, 2 * K], gates before ups -> the same of silu(gate) * up
std::tuple<Tensor, Tensor, Tensor, Tensor> silu_mul_quantize(const Tensor& x, int64_t bits, bool symmetric,
                                                             int64_t block) {
  const char* op = "silu_mul_quantize";
  const Quantized made(op, x, check_rows(op, x, true), bits, symmetric, block);
  if (x.size(0) > 0) {
    const SiluMulQuantize args = {made.args};
    if (x.device().is_cpu()) {
      cpu::kernels().silu_mul_quantize(args, run_parallel);
    } else {
      run_cuda(op, args, x.device().index(), SLIDERQUANT_LAUNCH(silu_mul_quantize));
    }
  }
  return {made.codes, made.scale, made.zero, made.row_sum};
}

Tensor hadamard(const Tensor& x, int64_t block) {
  const char* op = "hadamard";
  const Float type = float_type(op, "x", x.scalar_type(), true);
  if (x.dim() < 1) fail(op, "x: expected [..., K]; got ", describe(x));
  const int64_t k = x.size(x.dim() - 1);
  check_block(op, x, block, k);
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor y = torch::stable::empty_like(rows);
  if (x.numel() > 0) {
    const Hadamard args = {
        .x = rows.const_data_ptr(),
        .y = y.mutable_data_ptr(),
        .type = type,
        .m = x.numel() / k,
        .k = k,
        .block = block,
    };
    if (x.device().is_cpu()) {
      cpu::kernels().hadamard(args, run_parallel);
    } else {
      run_cuda(op, args, x.device().index(), SLIDERQUANT_LAUNCH(hadamard));
    }
  }
  return y;
}

}  // namespace sliderquant::binding
