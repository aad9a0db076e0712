// Matrix products and what prepares their weights.
#include <cstdint>
#include <optional>
#include <string>

#include "ops.h"
#include "run.h"

namespace sliderquant::binding {
namespace {

// With one weight, or with those of several experts where there are offsets.
Tensor wna16(const char* op, const Tensor* offsets, const Tensor& x, const Tensor& w_packed, const Tensor& scale,
             const Optional& zero, const Optional& bias, int64_t bits, int64_t group_size) {
  const Float type = check_input(op, x);
  check_bits(op, "bits", bits);
  if (group_size != -1 && group_size != 32 && group_size != 64 && group_size != 128) {
    fail(op, "group_size: expected -1, 32, 64 or 128; got ", group_size);
  }
  const int64_t m = x.size(0), k = x.size(1);
  check_in_features(op, k);
  if (group_size != -1 && k % group_size != 0) fail(op, "group_size: ", group_size, " does not divide K=", k);
  const bool grouped = offsets != nullptr;
  if (scale.dim() != (grouped ? 3 : 2)) {
    fail(op, "scale: expected float32 ", grouped ? "[E, G, N]" : "[G, N]", "; got ", describe(scale));
  }
  const int64_t group = group_size == -1 ? k : group_size, groups = k / group, n = scale.size(scale.dim() - 1);
  const Expectation e = {op,
                         " for bits=" + std::to_string(bits) + ", group_size=" + std::to_string(group_size) +
                             ", N=" + std::to_string(n) + ", K=" + std::to_string(k),
                         x, grouped ? std::optional(scale.size(0)) : std::nullopt};
  check_each(e, "scale", scale, ScalarType::Float, {groups, n});
  check_weight(e, w_packed, static_cast<int>(bits), n, k, false);
  if (zero.has_value()) check_each(e, "zero", *zero, ScalarType::Byte, {groups, n});
  if (bias.has_value()) check_each(e, "bias", *bias, ScalarType::Float, {n});
  const Experts experts = grouped ? check_offsets(e, *offsets, m) : Experts{};

  const Tensor y = torch::stable::new_empty(x, {m, n});
  if (m == 0 || n == 0) return y;
  const Wna16 args = {
      .x = data<uint16_t>(x),
      .x_type = type,
      .x_stride = x.stride(0),
      .w = data<uint32_t>(w_packed),
      .scale = data<float>(scale),
      .zero = data<uint8_t>(zero),
      .bias = data<float>(bias),
      .y = static_cast<uint16_t*>(y.mutable_data_ptr()),
      .m = m,
      .n = n,
      .k = k,
      .group = group,
      .bits = static_cast<int>(bits),
  };
  if (x.device().is_cpu()) {
    if (grouped) {
      cpu::wna16_grouped(args, experts, run_parallel);
    } else {
      cpu::kernels().wna16(args, cpu::all_panels(n), run_parallel);
    }
  } else if (grouped) {
    wna16_grouped_cuda(op, x, args, experts);
  } else {
    wna16_cuda(op, x, args);
  }
  return y;
}

}  // namespace

Tensor wna16_gemm(const Tensor& x, const Tensor& w_packed, const Tensor& scale, const Optional& zero,
                  const Optional& bias, int64_t bits, int64_t group_size) {
  return wna16("wna16_gemm", nullptr, x, w_packed, scale, zero, bias, bits, group_size);
}

Tensor wna16_gemm_grouped(const Tensor& x, const Tensor& offsets, const Tensor& w_packed, const Tensor& scale,
                          const Optional& zero, const Optional& bias, int64_t bits, int64_t group_size) {
  return wna16("wna16_gemm_grouped", &offsets, x, w_packed, scale, zero, bias, bits, group_size);
}

namespace {

// With one weight, or with those of several experts where there are offsets.
Tensor w4a4(const char* op, const Tensor* offsets, const Tensor& codes, const Tensor& sa, const Tensor& za,
            const Tensor& row_sum, const Tensor& w_packed, const Tensor& sw, const Optional& zw, const Tensor& col_sum,
            const Optional& bias, int64_t weight_bits, ScalarType out_dtype) {
  check_bits(op, "weight_bits", weight_bits);
  const Float type = float_type(op, "out_dtype", out_dtype, true);
  if (codes.dim() != 2) fail(op, "codes: expected uint8 [M, K]; got ", describe(codes));
  const int64_t m = codes.size(0), k = codes.size(1);
  check_in_features(op, k);
  // Activation codes may take all 8 bits; the bracket must fit int32 whatever they are.
  const int64_t k_limit = INT32_MAX / (255 * ((int64_t{1} << weight_bits) - 1));
  if (k > k_limit) {
    fail(op, "K: at most ", k_limit, " input channels keep ", weight_bits, "-bit sums within int32; got ", k);
  }
  const bool grouped = offsets != nullptr;
  if (sw.dim() != (grouped ? 2 : 1)) {
    fail(op, "sw: expected float32 ", grouped ? "[E, N]" : "[N]", "; got ", describe(sw));
  }
  const int64_t n = sw.size(sw.dim() - 1);
  const Expectation e = {op,
                         " for weight_bits=" + std::to_string(weight_bits) + ", M=" + std::to_string(m) +
                             ", N=" + std::to_string(n) + ", K=" + std::to_string(k),
                         codes, grouped ? std::optional(sw.size(0)) : std::nullopt};
  check(e, "codes", codes, ScalarType::Byte, {m, k});
  check(e, "sa", sa, ScalarType::Float, {m});
  check(e, "za", za, ScalarType::Int, {m});
  check(e, "row_sum", row_sum, ScalarType::Int, {m});
  check_each(e, "sw", sw, ScalarType::Float, {n});
  check_each(e, "col_sum", col_sum, ScalarType::Int, {n});
  check_weight(e, w_packed, static_cast<int>(weight_bits), n, k, true);
  if (zw.has_value()) check_each(e, "zw", *zw, ScalarType::Byte, {n});
  if (bias.has_value()) check_each(e, "bias", *bias, ScalarType::Float, {n});
  const Experts experts = grouped ? check_offsets(e, *offsets, m) : Experts{};

  const Tensor y = torch::stable::new_empty(codes, {m, n}, out_dtype);
  if (m == 0 || n == 0) return y;
  const IntegerGemm args = {
      .codes = data<uint8_t>(codes),
      .sa = data<float>(sa),
      .za = data<int32_t>(za),
      .row_sum = data<int32_t>(row_sum),
      .w = data<uint32_t>(w_packed),
      .sw = data<float>(sw),
      .zw = data<uint8_t>(zw),
      .col_sum = data<int32_t>(col_sum),
      .bias = data<float>(bias),
      .y = y.mutable_data_ptr(),
      .y_type = type,
      .m = m,
      .n = n,
      .k = k,
      .bits = static_cast<int>(weight_bits),
  };
  if (codes.device().is_cpu()) {
    if (grouped) {
      cpu::integer_gemm_grouped(args, experts, run_parallel);
    } else {
      cpu::kernels().integer_gemm(args, cpu::all_panels(n), run_parallel);
    }
  } else if (grouped) {
    integer_grouped_cuda(op, codes, args, experts);
  } else {
    integer_cuda(op, codes, args);
  }
  return y;
}

}  // namespace

Tensor w4a4_gemm(const Tensor& codes, const Tensor& sa, const Tensor& za, const Tensor& row_sum,
                 const Tensor& w_packed, const Tensor& sw, const Optional& zw, const Tensor& col_sum,
                 const Optional& bias, int64_t weight_bits, ScalarType out_dtype) {
  return w4a4("w4a4_gemm", nullptr, codes, sa, za, row_sum, w_packed, sw, zw, col_sum, bias, weight_bits, out_dtype);
}

Tensor w4a4_gemm_grouped(const Tensor& codes, const Tensor& sa, const Tensor& za, const Tensor& row_sum,
                         const Tensor& offsets, const Tensor& w_packed, const Tensor& sw, const Optional& zw,
                         const Tensor& col_sum, const Optional& bias, int64_t weight_bits, ScalarType out_dtype) {
  return w4a4("w4a4_gemm_grouped", &offsets, codes, sa, za, row_sum, w_packed, sw, zw, col_sum, bias, weight_bits,
              out_dtype);
}

namespace {

// weight_packed [N, K * bits / 32] in checkpoint packing; K
int64_t check_stream(const char* op, const Tensor& weight_packed, int64_t bits) {
  check_bits(op, "bits", bits);
  if (weight_packed.dim() != 2 || weight_packed.scalar_type() != ScalarType::Int || !weight_packed.is_contiguous()) {
    fail(op, "weight_packed: expected contiguous int32 [N, K * bits / 32]; got ", describe(weight_packed));
  }
  const int64_t k = weight_packed.size(1) * 32 / bits;
  check_in_features(op, k);
  if (weight_packed.size(1) * 32 % bits != 0) {
    fail(op, "weight_packed: expected whole codes of ", bits, " bits in every row; got ", describe(weight_packed));
  }
  return k;
}

}  // namespace

// -> kernel layout, as check_weight expects it.
Tensor repack(const Tensor& weight_packed, int64_t bits, int64_t activation_bits) {
  const char* op = "repack";
  const int64_t k = check_stream(op, weight_packed, bits), n = weight_packed.size(0);
  if (activation_bits != 16 && (activation_bits < 2 || activation_bits > 8)) {
    fail(op, "activation_bits: expected 16, or 2 to 8; got ", activation_bits);
  }
  const bool pairs = activation_bits == 16, on_cpu = weight_packed.device().is_cpu();
  const int width = static_cast<int>(bits);
  const int64_t rows = on_cpu ? layout::panels(n) : layout::gpu::panels(n);
  const int64_t columns = on_cpu ? layout::row_words(width, k) : layout::gpu::chunks(k);
  const int64_t words = on_cpu ? layout::kPanelRows : layout::gpu::chunk_words(width);
  const Tensor packed = torch::stable::new_empty(weight_packed, {rows, columns, pairs ? words : 4 * words},
                                                 pairs ? ScalarType::Int : ScalarType::Byte);
  if (n == 0) return packed;
  const Repack args = {
      .stream = data<uint32_t>(weight_packed),
      .packed = static_cast<uint32_t*>(packed.mutable_data_ptr()),
      .n = n,
      .k = k,
      .bits = width,
      .pairs = pairs,
  };
  if (on_cpu) {
    cpu::kernels().repack(args, run_parallel);
  } else {
    run_cuda(op, args, weight_packed.device().index(), SLIDERQUANT_LAUNCH(repack));
  }
  return packed;
}

Tensor column_sums(const Tensor& weight_packed, int64_t bits) {
  const int64_t k = check_stream("column_sums", weight_packed, bits), n = weight_packed.size(0);
  const Tensor sums = torch::stable::new_empty(weight_packed, {n});
  cpu::kernels().column_sums(
      {
          .stream = data<uint32_t>(weight_packed),
          .sums = static_cast<int32_t*>(sums.mutable_data_ptr()),
          .n = n,
          .k = k,
          .bits = static_cast<int>(bits),
      },
      run_parallel);
  return sums;
}

}  // namespace sliderquant::binding
