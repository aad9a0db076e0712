// Random shapes through the CPU kernels, in buffers of exactly the size that they are promised, against float64. Built
// with sanitizers. Arguments: number of cases, seed. SLIDERQUANT_ISA chooses the kernels.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../csrc/cpu/api.h"
#include "../csrc/cpu/features.h"

using namespace sliderquant;

namespace {

std::mt19937_64 generator;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool coin() { return between(0, 1) == 1; }
float normal() { return std::normal_distribution<float>()(generator); }

template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
}

void serial(int64_t count, int64_t, cpu::RangeBody body, void* context) {
  const int64_t half = count / 2;  // ranges as two threads would get them
  if (half > 0) body(0, half, context);
  if (half < count) body(half, count, context);
}

struct Case {
  int64_t m, n, k, group;
  std::vector<int32_t> offsets;  // of the experts; empty for a product with a single weight
  int bits;
  bool symmetric, biased;
  Float type;
};

Case random_case(bool grouped) {
  Case c;
  c.group = grouped ? one_of<int64_t>({-1, 32, 64, 128}) : -1;
  c.m = one_of<int64_t>({between(1, 5), between(5, 40), between(250, 260)});
  c.n = between(1, 100);
  c.k = std::max<int64_t>(c.group, 32) * between(1, c.m < 40 ? 20 : 6);
  if (c.group == -1) c.group = c.k;
  c.bits = one_of({2, 3, 4, 8});
  c.symmetric = coin();
  c.biased = coin();
  c.type = coin() ? Float::kBf16 : Float::kFp16;
  if (coin()) {
    c.offsets = {0};
    for (int64_t experts = between(1, 4); experts > 0; --experts) {
      const int32_t last = c.offsets.back();
      c.offsets.push_back(static_cast<int32_t>(one_of<int64_t>({last, between(last, c.m), c.m})));
    }
  }
  return c;
}

int64_t weights(const Case& c) { return c.offsets.empty() ? 1 : static_cast<int64_t>(c.offsets.size()) - 1; }

// Which weight token m meets, -1 for none.
int64_t weight_of(const Case& c, int64_t m) {
  if (c.offsets.empty()) return 0;
  if (m >= c.offsets.back()) return -1;
  return std::upper_bound(c.offsets.begin(), c.offsets.end(), m) - c.offsets.begin() - 1;
}

// Codes [weights, n, k] in kernel layout; channels beyond n are zero codes.
std::vector<uint32_t> packed(const std::vector<uint8_t>& codes, layout::Family family, const Case& c) {
  const int64_t size = layout::packed_words(c.bits, c.n, c.k);
  std::vector<uint32_t> words(weights(c) * size);
  const int period = layout::period_codes(c.bits);
  for (int64_t n = 0; n < weights(c) * c.n; ++n) {
    uint32_t* weight = words.data() + n / c.n * size;
    for (int64_t k = 0; k < c.k; ++k) {
      for (int b = 0; b < c.bits; ++b) {
        const int bit = layout::kernel_bit(family, c.bits, static_cast<int>(k % period), b);
        const uint32_t value = codes[n * c.k + k] >> b & 1;
        weight[layout::word_index(c.bits, c.k, n % c.n, k / period, bit / 32)] |= value << bit % 32;
      }
    }
  }
  return words;
}

[[noreturn]] void fail(const char* op, const Case& c, double found, double expected) {
  std::printf("%s: found %g, expected %g; m=%ld n=%ld k=%ld group=%ld bits=%d symmetric=%d biased=%d fp16=%d\n", op,
              found, expected, static_cast<long>(c.m), static_cast<long>(c.n), static_cast<long>(c.k),
              static_cast<long>(c.group), c.bits, c.symmetric, c.biased, c.type == Float::kFp16);
  for (const int32_t offset : c.offsets) std::printf("expert from %d on\n", offset);
  std::exit(1);
}

// Rounded once to the type, after fp32 sums of terms that add up to magnitude and have the error given.
void check(const char* op, const Case& c, double found, double expected, double magnitude, Float type,
           double of_terms = 0) {
  const double half_ulp = type == Float::kBf16 ? 0x1p-8 : type == Float::kFp16 ? 0x1p-11 : 0x1p-24;
  if (!(std::abs(found - expected) <= half_ulp * std::abs(expected) + (1e-6 + of_terms) * magnitude + 0x1p-24)) {
    fail(op, c, found, expected);
  }
}

template <class T>
std::vector<T> filled(int64_t count, T (*next)()) {
  std::vector<T> values(count);
  std::generate(values.begin(), values.end(), next);
  return values;
}

std::vector<uint16_t> random_halves(int64_t count, Float type) {
  std::vector<uint16_t> values(count);
  for (int64_t i = 0; i < count; ++i) store_float(values.data(), type, i, normal());
  return values;
}

std::vector<uint8_t> random_codes(int64_t count, int bits) {
  std::vector<uint8_t> codes(count);
  for (auto& code : codes) code = static_cast<uint8_t>(between(0, (1 << bits) - 1));
  return codes;
}

void wna16() {
  const Case c = random_case(true);
  const int64_t stride = c.k + between(0, 7), groups = c.k / c.group, count = weights(c);
  const auto x = random_halves((c.m - 1) * stride + c.k, c.type);
  const auto codes = random_codes(count * c.n * c.k, c.bits), zero = random_codes(count * groups * c.n, c.bits);
  const auto words = packed(codes, layout::Family::kPairs, c);
  const auto bias = filled<float>(count * c.n, normal);
  auto scale = filled<float>(count * groups * c.n, normal);
  for (auto& value : scale) value = std::abs(value) * static_cast<float>(std::exp2(between(-12, 0)));
  std::vector<uint16_t> y(c.m * c.n);
  Wna16 a = {};
  a.x = x.data(), a.x_type = c.type, a.x_stride = stride, a.w = words.data(), a.scale = scale.data();
  a.zero = c.symmetric ? nullptr : zero.data(), a.bias = c.biased ? bias.data() : nullptr, a.y = y.data();
  a.m = c.m, a.n = c.n, a.k = c.k, a.group = c.group, a.bits = c.bits;
  if (c.offsets.empty()) {
    cpu::kernels().wna16(a, cpu::all_panels(c.n), serial);
  } else {
    cpu::wna16_grouped(a, {c.offsets.data(), count}, serial);
  }
  // Tiles take dequantized weights in bf16 where there are many tokens.
  const bool rounds = cpu::choose_isa(std::getenv("SLIDERQUANT_ISA")) == "amx" && c.type == Float::kBf16 &&
                      groups > 1 && c.m > 64;
  const double of_weights = rounds ? 1.4 * 0x1p-8 : 0;
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      const int64_t w = weight_of(c, m), row = w * c.n + n;
      double sum = w >= 0 && c.biased ? bias[row] : 0, magnitude = std::abs(sum);
      for (int64_t k = 0; w >= 0 && k < c.k; ++k) {
        const int64_t at = (w * groups + k / c.group) * c.n + n;
        const int centred = codes[row * c.k + k] - (c.symmetric ? 1 << (c.bits - 1) : zero[at]);
        const double term = static_cast<double>(load_float(x.data(), c.type, m * stride + k)) * centred * scale[at];
        sum += term;
        magnitude += std::abs(term);
      }
      check("wna16", c, load_float(y.data(), c.type, m * c.n + n), sum, magnitude, c.type, of_weights);
    }
  }
}

void integer_gemm() {
  const Case c = random_case(false);
  const int64_t count = weights(c);
  const auto weight = random_codes(count * c.n * c.k, c.bits), zw = random_codes(count * c.n, c.bits);
  const auto codes = random_codes(c.m * c.k, 8), offsets = random_codes(c.m, 8);
  const auto words = packed(weight, layout::Family::kQuads, c);
  const auto sa = filled<float>(c.m, normal), sw = filled<float>(count * c.n, normal);
  const auto bias = filled<float>(count * c.n, normal);
  std::vector<int32_t> za(offsets.begin(), offsets.end()), row_sum(c.m), col_sum(count * c.n);
  for (int64_t i = 0; i < c.m * c.k; ++i) row_sum[i / c.k] += codes[i];
  for (int64_t i = 0; i < count * c.n * c.k; ++i) col_sum[i / c.k] += weight[i];
  std::vector<float> y(c.m * c.n);
  IntegerGemm a = {};
  a.codes = codes.data(), a.sa = sa.data(), a.za = za.data(), a.row_sum = row_sum.data(), a.w = words.data();
  a.sw = sw.data(), a.zw = c.symmetric ? nullptr : zw.data(), a.col_sum = col_sum.data();
  a.bias = c.biased ? bias.data() : nullptr, a.y = y.data(), a.y_type = Float::kFp32;
  a.m = c.m, a.n = c.n, a.k = c.k, a.bits = c.bits;
  if (c.offsets.empty()) {
    cpu::kernels().integer_gemm(a, cpu::all_panels(c.n), serial);
  } else {
    cpu::integer_gemm_grouped(a, {c.offsets.data(), count}, serial);
  }
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      const int64_t w = weight_of(c, m), row = w * c.n + n;
      if (w < 0) {
        check("integer_gemm", c, y[m * c.n + n], 0, 0, Float::kFp32);
        continue;
      }
      int64_t bracket = 0;
      const int zero = c.symmetric ? 1 << (c.bits - 1) : zw[row];
      for (int64_t k = 0; k < c.k; ++k) bracket += (codes[m * c.k + k] - za[m]) * (weight[row * c.k + k] - zero);
      const double product = static_cast<double>(bracket) * sa[m] * sw[row], added = c.biased ? bias[row] : 0;
      check("integer_gemm", c, y[m * c.n + n], product + added, std::abs(product) + std::abs(added), Float::kFp32);
    }
  }
}

// The transform of runs of values by its definition, in float64.
std::vector<double> transformed(const std::vector<double>& x, int64_t block) {
  std::vector<double> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    for (size_t j = 0; j < static_cast<size_t>(block); ++j) {
      const double value = x[i / block * block + j];
      y[i] += __builtin_parityll(i % block & j) != 0 ? -value : value;
    }
    y[i] /= std::sqrt(static_cast<double>(block));
  }
  return y;
}

// Tokens that a quantizer reads, and what it writes.
struct Rows {
  Case c;
  int64_t block, stride;
  std::vector<uint16_t> x;
  std::vector<uint8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> zero, row_sum;

  explicit Rows(int64_t width) : c(random_case(false)), block(int64_t{1} << between(0, 6)) {
    c.m = between(1, 6), c.k = block * between(1, 9), c.bits = static_cast<int>(between(2, 8));
    stride = width * c.k + between(0, 7);
    x = random_halves((c.m - 1) * stride + width * c.k, c.type);
    codes.resize(c.m * c.k), scale.resize(c.m), zero.resize(c.m), row_sum.resize(c.m);
  }

  Quantize arguments() {
    Quantize q = {};
    q.x = x.data(), q.x_type = c.type, q.x_stride = stride, q.codes = codes.data(), q.scale = scale.data();
    q.zero = zero.data(), q.row_sum = row_sum.data(), q.m = c.m, q.k = c.k, q.block = block, q.bits = c.bits;
    q.symmetric = c.symmetric;
    return q;
  }

  double at(int64_t m, int64_t k) const { return load_float(x.data(), c.type, m * stride + k); }

  // One row against the values that it stands for, which were rounded to 16 bits so many times on the way.
  void check_row(const char* op, int64_t m, const std::vector<double>& values, int roundings) const {
    const double half_ulp = c.type == Float::kBf16 ? 0x1p-8 : 0x1p-11;
    double largest = 0;
    for (const double value : values) largest = std::max(largest, std::abs(value));
    const double apart = 1.01 * scale[m] + 1.1 * roundings * half_ulp * largest * std::sqrt(static_cast<double>(block));
    const auto exact = transformed(values, block);
    int32_t sum = 0;
    for (int64_t k = 0; k < c.k; ++k) {
      const double value = (codes[m * c.k + k] - zero[m]) * static_cast<double>(scale[m]);
      if (!(std::abs(value - exact[k]) <= apart)) fail(op, c, value, exact[k]);
      sum += codes[m * c.k + k];
    }
    if (sum != row_sum[m]) fail("row_sum", c, row_sum[m], sum);
  }
};

void quantize() {
  Rows r(1);
  cpu::kernels().quantize(r.arguments(), serial);
  for (int64_t m = 0; m < r.c.m; ++m) {
    std::vector<double> values(r.c.k);
    for (int64_t k = 0; k < r.c.k; ++k) values[k] = r.at(m, k);
    r.check_row("quantize", m, values, 0);
  }
}

void hadamard() {
  const Rows r(1);
  const Case& c = r.c;
  const auto dense = random_halves(c.m * c.k, c.type);
  std::vector<uint16_t> y(c.m * c.k);
  cpu::kernels().hadamard({dense.data(), y.data(), c.type, c.m, c.k, r.block}, serial);
  std::vector<double> values(c.m * c.k);
  for (int64_t i = 0; i < c.m * c.k; ++i) values[i] = load_float(dense.data(), c.type, i);
  const auto exact = transformed(values, r.block);
  for (int64_t i = 0; i < c.m * c.k; ++i) check("hadamard", c, load_float(y.data(), c.type, i), exact[i], 10, c.type);
}

void rms_norm_quantize() {
  Rows r(1);
  const Case& c = r.c;
  const int64_t stride = c.k + between(0, 7);
  const auto residual = random_halves((c.m - 1) * stride + c.k, c.type), weight = random_halves(c.k, c.type);
  const bool added = coin();
  std::vector<uint16_t> sum(c.m * c.k);
  RmsNormQuantize a = {};
  a.quantize = r.arguments(), a.weight = weight.data(), a.epsilon = 0.1f;
  if (added) a.residual = residual.data(), a.residual_stride = stride, a.sum = sum.data();
  cpu::kernels().rms_norm_quantize(a, serial);
  for (int64_t m = 0; m < c.m; ++m) {
    std::vector<double> values(c.k);
    double squares = 0;
    for (int64_t k = 0; k < c.k; ++k) {
      values[k] = r.at(m, k) + (added ? load_float(residual.data(), c.type, m * stride + k) : 0);
      if (added) check("sum", c, load_float(sum.data(), c.type, m * c.k + k), values[k], std::abs(values[k]), c.type);
      squares += values[k] * values[k];
    }
    const double factor = 1 / std::sqrt(squares / static_cast<double>(c.k) + 0.1f);
    for (int64_t k = 0; k < c.k; ++k) values[k] *= factor * load_float(weight.data(), c.type, k);
    r.check_row("rms_norm_quantize", m, values, 2);
  }
}

void silu_mul_quantize() {
  Rows r(2);
  cpu::kernels().silu_mul_quantize({r.arguments()}, serial);
  for (int64_t m = 0; m < r.c.m; ++m) {
    std::vector<double> values(r.c.k);
    for (int64_t k = 0; k < r.c.k; ++k) {
      const double gate = r.at(m, k);
      values[k] = gate / (1 + std::exp(-gate)) * r.at(m, r.c.k + k);
    }
    r.check_row("silu_mul_quantize", m, values, 2);
  }
}

void fake_quantize() {
  const int64_t groups = between(1, 40), size = between(1, 300), values = groups * size;
  const int max_code = one_of({3, 7, 15, 255});
  std::vector<float> weight(values), scale(groups), zero(groups), quantized(values), grad(values), passed(values);
  std::vector<float> sums(3 * groups);
  std::vector<int16_t> error(values);
  for (float& each : weight) each = normal();
  for (float& each : grad) each = normal();
  for (float& each : scale) each = 0.01f + std::abs(normal()) / static_cast<float>(max_code);
  for (float& each : zero) each = static_cast<float>(between(0, max_code));
  cpu::kernels().fake_quantize(
      {weight.data(), scale.data(), zero.data(), quantized.data(), error.data(), groups, size, max_code}, serial);
  cpu::kernels().fake_quantize_backward({grad.data(), error.data(), passed.data(), sums.data(), groups, size}, serial);
  for (int64_t group = 0; group < groups; ++group) {
    const double step = scale[group], lowest = -zero[group] * step, highest = (max_code - zero[group]) * step;
    double outside = 0, moved = 0;
    Case c = {};
    c.n = groups, c.k = size;
    for (int64_t i = group * size; i < (group + 1) * size; ++i) {
      const double value = std::clamp<double>(weight[i], lowest, highest);
      if (std::abs(quantized[i] - value) > 0.51 * step) fail("fake_quantize", c, quantized[i], value);
      if (passed[i] == 0) {
        outside += grad[i];
      } else {
        moved += grad[i] * (quantized[i] - weight[i]) / step;
      }
    }
    check("sums of gradients", c, sums[group] + sums[groups + group], outside, static_cast<double>(size), Float::kFp32);
    check("gradients along errors", c, sums[2 * groups + group], moved, 100.0 * static_cast<double>(size), Float::kFp32);
  }
}

}  // namespace

int main(int, char** arguments) {
  const int64_t cases = std::atoll(arguments[1]);
  const uint64_t seed = std::strtoull(arguments[2], nullptr, 10);
  generator.seed(seed);
  std::printf("%s, seed %llu\n", cpu::choose_isa(std::getenv("SLIDERQUANT_ISA")).c_str(),
              static_cast<unsigned long long>(seed));
  for (int64_t i = 0; i < cases; ++i) {
    wna16();
    integer_gemm();
    quantize();
    hadamard();
    rms_norm_quantize();
    silu_mul_quantize();
    fake_quantize();
  }
  return 0;
}
