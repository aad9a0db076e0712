// Fake quantization of a weight and its gradient, one pass over memory each. For every instruction set.
//
// Bit for bit the reference: IEEE division, round half to even. A NaN stays one, so that a loss shows it.
#include <type_traits>

#include "../formula.h"
#include "api.h"
#include "simd.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));

constexpr int64_t kGrainValues = 16384;  // values that are worth a thread

// body(row) for all groups of all rows.
template <class Body>
void for_groups(Parallel parallel, int64_t groups, int64_t size, const Body& body) {
  parallel_for(parallel, groups, 1 + kGrainValues / size, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) body(group);
  });
}

SLIDERQUANT_INLINE inline Floats clamp(Floats x, float low, float high) {
  x = x < splat(low) ? splat(low) : x;
  return x > splat(high) ? splat(high) : x;
}

// Round half to even, of what is below 2^22.
SLIDERQUANT_INLINE inline Floats round(Floats x) {
  const Floats big = splat(12582912.0f);  // 1.5 * 2^23
  return (x + big) - big;
}

struct Rounded {
  Floats value;
  Ints error;
};

SLIDERQUANT_INLINE inline Rounded round_weight(Floats weight, float scale, float zero, float max_code) {
  const Floats position = weight / splat(scale) + splat(zero);
  const Floats code = round(clamp(position, 0, max_code));
  const Floats error = round(clamp(code - position, -1, 1) * splat(float{kErrorOne}));
  return {(code - splat(zero)) * splat(scale), __builtin_convertvector(error, Ints)};
}

float sum(Floats lanes) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// body(k, count) for the registers that a group of so many values takes: count is a constant but for the last one,
// which may be part of a register.
template <class Body>
SLIDERQUANT_INLINE inline void for_registers(int64_t size, const Body& body) {
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) body(k, std::integral_constant<int64_t, kLanes>{});
  if (k < size) body(k, size - k);
}

// The first count of a register's lanes, the others 0.
template <class Vector, class Element>
SLIDERQUANT_INLINE inline Vector load_some(const Element* from, int64_t count) {
  Vector value = {};
  memcpy(&value, from, count * sizeof(Element));
  return value;
}

}  // namespace

void fake_quantize(const FakeQuantize& a, Parallel parallel) {
  for_groups(parallel, a.groups, a.size, [&](int64_t group) {
    const float scale = a.scale[group], zero = a.zero[group];
    const int64_t first = group * a.size;
    for_registers(a.size, [&](int64_t k, auto count) SLIDERQUANT_INLINE {
      const auto weight = load_some<Floats>(a.weight + first + k, count);
      const Rounded rounded = round_weight(weight, scale, zero, static_cast<float>(a.max_code));
      const auto error = __builtin_convertvector(rounded.error, Shorts);
      memcpy(a.quantized + first + k, &rounded.value, count * sizeof(float));
      memcpy(a.error + first + k, &error, count * sizeof(int16_t));
    });
  });
}

void fake_quantize_backward(const FakeQuantizeBackward& a, Parallel parallel) {
  for_groups(parallel, a.groups, a.size, [&](int64_t group) {
    Floats above = {}, below = {}, along = {};
    const int64_t first = group * a.size;
    for_registers(a.size, [&](int64_t k, auto count) SLIDERQUANT_INLINE {
      const auto grad = load_some<Floats>(a.grad + first + k, count);
      const Ints error = __builtin_convertvector(load_some<Shorts>(a.error + first + k, count), Ints);
      const Ints is_above = error < -kErrorOne / 2, is_below = error > kErrorOne / 2;
      const Floats inside = (is_above | is_below) ? Floats{} : grad;
      above += is_above ? grad : Floats{};
      below += is_below ? grad : Floats{};
      along += inside * __builtin_convertvector(error, Floats);
      memcpy(a.grad_weight + first + k, &inside, count * sizeof(float));
    });
    a.sums[group] = sum(above);
    a.sums[a.groups + group] = sum(below);
    a.sums[2 * a.groups + group] = sum(along) / kErrorOne;
  });
}

}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
