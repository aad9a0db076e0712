// 16-bit float conversions on bit patterns, the same on host and device, for code that has no instruction for them.
#pragma once

#include <cstdint>
#include <cstring>

#include "portability.h"

namespace sliderquant {

// Dtypes that cross the boundary; the values are ours, binding/check.h translates torch's.
enum class Float { kBf16, kFp16, kFp32 };

SLIDERQUANT_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SLIDERQUANT_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SLIDERQUANT_HOST_DEVICE float bf16_to_float(uint16_t value) {
  return bits_to_float(static_cast<uint32_t>(value) << 16);
}

SLIDERQUANT_HOST_DEVICE uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // keep NaN a NaN
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

SLIDERQUANT_HOST_DEVICE float fp16_to_float(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t magnitude = value & 0x7FFF;
  if (magnitude >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Exact for normals and subnormals alike: the exponent is rebiased by a multiplication with 2^112.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000)));
}

SLIDERQUANT_HOST_DEVICE uint16_t float_to_fp16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint32_t sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {
    // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 lets the fp32 adder round to exactly that step.
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000));
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

SLIDERQUANT_HOST_DEVICE float load_float(const void* values, Float type, int64_t index) {
  switch (type) {
    case Float::kBf16: return bf16_to_float(static_cast<const uint16_t*>(values)[index]);
    case Float::kFp16: return fp16_to_float(static_cast<const uint16_t*>(values)[index]);
    default: return static_cast<const float*>(values)[index];
  }
}

SLIDERQUANT_HOST_DEVICE void store_float(void* values, Float type, int64_t index, float value) {
  switch (type) {
    case Float::kBf16: static_cast<uint16_t*>(values)[index] = float_to_bf16(value); break;
    case Float::kFp16: static_cast<uint16_t*>(values)[index] = float_to_fp16(value); break;
    default: static_cast<float*>(values)[index] = value;
  }
}

}  // namespace sliderquant
