// Ops on the rows of x: the Hadamard transform and per-token quantization, alone or one after the other without
// rounding in between. For every instruction set.
//
// Quantization is bit for bit the reference: IEEE division, round half to even. A NaN gets code 0 and does not widen
// the range.
#include <cmath>

#include "../formula.h"
#include "api.h"
#include "simd.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

constexpr int64_t kGrainValues = 16384;  // values that are worth a thread

Floats load_floats(const void* x, Float type, int64_t at) {
  if (type == Float::kFp32) return load<Floats>(static_cast<const float*>(x) + at);
  const auto* halves = static_cast<const uint16_t*>(x) + at;
  if (type == Float::kBf16) {
    return reinterpret_cast<Floats>(__builtin_convertvector(load<Halves>(halves), Words) << 16);
  }
  Floats value;
  for (int i = 0; i < kLanes; ++i) value[i] = fp16_to_float(halves[i]);
  return value;
}

// A row in fp32, and zeros up to a whole register.
void load_row(const void* x, Float type, int64_t at, int64_t count, float* row) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(row + k, load_floats(x, type, at + k));
  if (k == count) return;
  store(row + k, Floats{});
  for (; k < count; ++k) row[k] = load_float(x, type, at + k);
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

void quantize_row(const Quantize& a, int64_t m, float* row) {
  load_row(a.x, a.x_type, m * a.x_stride, a.k, row);
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

// float_to_bf16 of every lane.
SLIDERQUANT_INLINE inline Halves to_bf16(Floats value) {
  const auto bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const Words not_a_number = (bits >> 16) | 0x40;
  return __builtin_convertvector((bits & 0x7FFFFFFF) > 0x7F800000 ? not_a_number : rounded, Halves);
}

void store_row(const float* row, Float type, int64_t at, int64_t count, void* y) {
  int64_t k = 0;
  if (type == Float::kBf16) {
    auto* to = static_cast<uint16_t*>(y) + at;
    for (; k + kLanes <= count; k += kLanes) store(to + k, to_bf16(load<Floats>(row + k)));
  } else if (type == Float::kFp32) {
    std::copy(row, row + count, static_cast<float*>(y) + at);
    return;
  }
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

}  // namespace

void quantize(const Quantize& a, Parallel parallel) {
  for_rows(parallel, a.m, a.k, [&](int64_t m, float* row) { quantize_row(a, m, row); });
}

void hadamard(const Hadamard& a, Parallel parallel) {
  for_rows(parallel, a.m, a.k, [&](int64_t m, float* row) {
    load_row(a.x, a.type, m * a.k, a.k, row);
    transform(row, a.k, a.block);
    store_row(row, a.type, m * a.k, a.k, a.y);
  });
}

}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
