// Ops on the rows of x: the Hadamard transform and per-token quantization, alone or one after the other without
// rounding in between, and what vLLM's layers do before it, rounded as there. For every instruction set.
//
// Quantization is bit for bit the reference: IEEE division, round half to even. A NaN gets code 0 and does not widen
// the range. Sums of squares and exponentials are the same on every instruction set, but others than torch's: a value
// that falls half-way between two 16-bit floats but for the last bits of fp32 may go to the other one.
#include <cmath>

#include "../formula.h"
#include "api.h"
#include "simd.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

constexpr int64_t kGrainValues = 16384;  // values that are worth a thread

SLIDERQUANT_INLINE inline Floats load_floats(const void* x, Float type, int64_t at) {
  if (type == Float::kFp32) return load<Floats>(static_cast<const float*>(x) + at);
  const auto* halves = static_cast<const uint16_t*>(x) + at;
  if (type == Float::kBf16) {
    return reinterpret_cast<Floats>(__builtin_convertvector(load<Halves>(halves), Words) << 16);
  }
  Floats value;
  for (int i = 0; i < kLanes; ++i) value[i] = fp16_to_float(halves[i]);
  return value;
}

// The same where no more than `left` exist: zeros for the others.
SLIDERQUANT_INLINE inline Floats load_floats(const void* x, Float type, int64_t at, int64_t left) {
  if (left >= kLanes) return load_floats(x, type, at);
  Floats value = {};
  for (int i = 0; i < left; ++i) value[i] = load_float(x, type, at + i);
  return value;
}

// A row in fp32, and zeros up to a whole register.
void load_row(const void* x, Float type, int64_t at, int64_t count, float* row) {
  for (int64_t k = 0; k < count; k += kLanes) store(row + k, load_floats(x, type, at + k, count - k));
}

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// One butterfly within a register: lanes kStride apart become their sum and their difference.
template <int kStride>
SLIDERQUANT_INLINE inline Floats butterfly(Floats value) {
  Ints partner;
  Floats sign;
  for (int i = 0; i < kLanes; ++i) {
    partner[i] = i ^ kStride;
    sign[i] = (i & kStride) != 0 ? -1.0f : 1.0f;
  }
  return __builtin_shuffle(value, partner) + value * sign;
}

// Blocks of a row by the orthonormal Walsh-Hadamard matrix in Sylvester's order; block is a power of two.
void transform(float* row, int64_t count, int64_t block) {
  const float factor = 1 / std::sqrt(static_cast<float>(block));
  for (int64_t k = 0; k < count; k += kLanes) {
    Floats value = load<Floats>(row + k) * splat(factor);
    if (block > 1) value = butterfly<1>(value);
    if (block > 2) value = butterfly<2>(value);
    if constexpr (kLanes > 4) {
      if (block > 4) value = butterfly<4>(value);
    }
    if constexpr (kLanes > 8) {
      if (block > 8) value = butterfly<8>(value);
    }
    store(row + k, value);
  }
  for (int64_t stride = kLanes; stride < block; stride *= 2) {
    for (int64_t k = 0; k < count; k += 2 * stride) {
      for (int64_t i = k; i < k + stride; i += kLanes) {
        const Floats a = load<Floats>(row + i), b = load<Floats>(row + i + stride);
        store(row + i, a + b);
        store(row + i + stride, a - b);
      }
    }
  }
}

// Round half to even, of anything that is or will be clamped below 2^22.
SLIDERQUANT_INLINE inline Floats round(Floats x) {
  const Floats big = splat(12582912.0f);  // 1.5 * 2^23
  return (x + big) - big;
}

// The row's values, zeros up to a whole register.
void quantize_row(const Quantize& a, int64_t m, float* row) {
  if (a.block > 1) transform(row, a.k, a.block);

  Floats low = {}, high = {};
  for (int64_t k = 0; k < a.k; k += kLanes) {
    const Floats value = load<Floats>(row + k);
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  float lowest = 0, highest = 0;
  for (int i = 0; i < kLanes; ++i) {
    lowest = std::min(lowest, low[i]);
    highest = std::max(highest, high[i]);
  }
  const TokenGrid grid = token_grid(lowest, highest, a.bits, a.symmetric);

  uint8_t* codes = a.codes + m * a.k;
  const Floats scale = splat(grid.scale), zero = splat(grid.zero), max_code = splat(grid.max_code);
  Ints sums = {};
  int64_t k = 0;
  for (; k + kLanes <= a.k; k += kLanes) {
    Floats code = round(load<Floats>(row + k) / scale) + zero;
    code = code > Floats{} ? code : Floats{};
    code = code < max_code ? code : max_code;
    const Ints integer = __builtin_convertvector(code, Ints);
    sums += integer;
    store(codes + k, __builtin_convertvector(integer, Bytes));
  }
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  for (; k < a.k; ++k) {
    codes[k] = static_cast<uint8_t>(token_code(row[k], grid));
    sum += codes[k];
  }
  a.scale[m] = grid.scale;
  a.zero[m] = static_cast<int32_t>(grid.zero);
  a.row_sum[m] = sum;
}

// Each lane rounded to 16 bits.
SLIDERQUANT_INLINE inline Floats round_to(Floats value, Float type) {
  const auto bits = reinterpret_cast<Words>(value);
  if (type == Float::kBf16) {
    const Words rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
    return reinterpret_cast<Floats>((bits & 0x7FFFFFFF) > 0x7F800000 ? bits : rounded);
  }
  // The sum with a float 2^13 times as large, and at least 2^-1, rounds to the step of fp16 there.
  const Words magnitude = bits & 0x7FFFFFFF, normal = splat(uint32_t{0x38800000});
  const Words exponent = (magnitude > normal ? magnitude : normal) & 0x7F800000;
  const auto big = reinterpret_cast<Floats>((exponent + (13u << 23)) | 0x00400000);
  const Floats rounded = (value + big) - big;
  const auto infinity = reinterpret_cast<Floats>((bits & 0x80000000) | 0x7F800000);
  const Words held = reinterpret_cast<Words>(rounded) & 0x7FFFFFFF;
  // From 65536 on fp16 is infinite; what big would overflow for is larger.
  const Floats finite = magnitude >= 0x47800000 || held >= 0x47800000 ? infinity : rounded;
  return magnitude > 0x7F800000 ? value : finite;
}

// x / (1 + e^-x). The exponential is that of Cephes' expf, without fused operations.
SLIDERQUANT_INLINE inline Floats silu(Floats x) {
  Floats y = -x;
  y = y < splat(-104.0f) ? splat(-104.0f) : y;  // 0, and on the other side infinity, in fp32
  y = y > splat(104.0f) ? splat(104.0f) : y;
  const Floats n = round(y * splat(1.44269504088896341f));
  const Floats r = (y - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Floats p = r * splat(1.9875691500e-4f) + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  // By 2^n in two steps, so that it overflows and underflows as it should.
  const Ints steps = __builtin_convertvector(n == n ? n : Floats{}, Ints), half = steps >> 1;
  const auto power = [](Ints exponent) { return reinterpret_cast<Floats>((exponent + 127) << 23); };
  return x / (splat(1.0f) + p * power(half) * power(steps - half));
}

void store_row(const float* row, Float type, int64_t at, int64_t count, void* y) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store_floats(y, type, at + k, load<Floats>(row + k));
  for (; k < count; ++k) store_float(y, type, at + k, row[k]);
}

// body(m, row) for all rows, with scratch for one of k values.
template <class Body>
void for_rows(Parallel parallel, int64_t rows, int64_t k, const Body& body) {
  parallel_for(parallel, rows, 1 + kGrainValues / (k + 1), [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto* row = scratch.get<float>(padded(k));
    for (int64_t m = begin; m < end; ++m) body(m, row);
  });
}

// Of the squares of a row, in as many columns as the widest register has lanes.
float sum_of_squares(const float* row, int64_t count) {
  constexpr int kColumns = 16, kParts = kColumns / kLanes;
  Floats sums[kParts] = {};
  const int64_t end = padded(count);
  for (int64_t k = 0; k < end; k += kColumns) {
    unroll<kParts>([&]<int I>() SLIDERQUANT_INLINE {
      if (k + I * kLanes < end) {
        const Floats value = load<Floats>(row + k + I * kLanes);
        sums[I] += value * value;
      }
    });
  }
  float sum = 0;
  for (int i = 0; i < kColumns; ++i) sum += sums[i / kLanes][i % kLanes];
  return sum;
}

template <Float kType>
void rms_norm_row(const RmsNormQuantize& a, int64_t m, float* row) {
  const Quantize& q = a.quantize;
  load_row(q.x, kType, m * q.x_stride, q.k, row);
  if (a.residual != nullptr) {
    for (int64_t k = 0; k < q.k; k += kLanes) {
      store(row + k, load<Floats>(row + k) + load_floats(a.residual, kType, m * a.residual_stride + k, q.k - k));
    }
    store_row(row, kType, m * q.k, q.k, a.sum);
  }
  const float mean = sum_of_squares(row, q.k) / static_cast<float>(q.k);
  const Floats factor = splat(1 / std::sqrt(mean + a.epsilon));
  for (int64_t k = 0; k < q.k; k += kLanes) {
    const Floats normal = round_to(load<Floats>(row + k) * factor, kType);
    store(row + k, round_to(normal * load_floats(a.weight, kType, k, q.k - k), kType));
  }
}

template <Float kType>
void silu_mul_row(const Quantize& q, int64_t m, float* row) {
  for (int64_t k = 0; k < q.k; k += kLanes) {
    const int64_t at = m * q.x_stride + k;
    const Floats active = round_to(silu(load_floats(q.x, kType, at, q.k - k)), kType);
    store(row + k, round_to(active * load_floats(q.x, kType, at + q.k, q.k - k), kType));
  }
}

}  // namespace

void quantize(const Quantize& a, Parallel parallel) {
  for_rows(parallel, a.m, a.k, [&](int64_t m, float* row) {
    load_row(a.x, a.x_type, m * a.x_stride, a.k, row);
    quantize_row(a, m, row);
  });
}

void rms_norm_quantize(const RmsNormQuantize& a, Parallel parallel) {
  const auto norm = a.quantize.x_type == Float::kBf16 ? rms_norm_row<Float::kBf16> : rms_norm_row<Float::kFp16>;
  for_rows(parallel, a.quantize.m, a.quantize.k, [&](int64_t m, float* row) {
    norm(a, m, row);
    quantize_row(a.quantize, m, row);
  });
}

void silu_mul_quantize(const SiluMulQuantize& a, Parallel parallel) {
  const auto activate = a.quantize.x_type == Float::kBf16 ? silu_mul_row<Float::kBf16> : silu_mul_row<Float::kFp16>;
  for_rows(parallel, a.quantize.m, a.quantize.k, [&](int64_t m, float* row) {
    activate(a.quantize, m, row);
    quantize_row(a.quantize, m, row);
  });
}

void hadamard(const Hadamard& a, Parallel parallel) {
  for_rows(parallel, a.m, a.k, [&](int64_t m, float* row) {
    load_row(a.x, a.type, m * a.k, a.k, row);
    transform(row, a.k, a.block);
    store_row(row, a.type, m * a.k, a.k, a.y);
  });
}

}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
