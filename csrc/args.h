// What one call of an op is given, on every device: m tokens, n output channels, k input channels.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace sliderquant {

// y = x @ ((code - zero) * scale).T + bias
struct Wna16 {
  const uint16_t* x;    // [m, k], rows x_stride apart
  Float x_type;         // kBf16 or kFp16; y has the same
  int64_t x_stride;
  const uint32_t* w;    // kPairs layout of the device
  const float* scale;   // [k / group, n]
  const uint8_t* zero;  // [k / group, n], null when symmetric
  const float* bias;    // [n] or null
  uint16_t* y;          // [m, n]
  int64_t m, n, k, group;
  int bits;
};

// codes, scale, zero and row_sum of each row of x, transformed before as Hadamard has it
struct Quantize {
  const uint16_t* x;  // [m, k], rows x_stride apart
  Float x_type;       // kBf16 or kFp16
  int64_t x_stride;
  uint8_t* codes;     // [m, k]
  float* scale;       // [m]
  int32_t* zero;      // [m]
  int32_t* row_sum;   // [m]
  int64_t m, k, block;
  int bits;
  bool symmetric;
};

// The same of rms_norm(x + residual) * weight, rounded as vLLM's layer does: to 16 bits before the weight and behind it.
struct RmsNormQuantize {
  Quantize quantize;
  const uint16_t* residual;  // [m, k], rows residual_stride apart, or null
  int64_t residual_stride;
  uint16_t* sum;           // [m, k]: x + residual, rounded; where there is a residual
  const uint16_t* weight;  // [k]
  float epsilon;
};

// The same of silu(gate) * up, where x is [m, 2 * k], gates before ups: both factors and the product are rounded to 16
// bits, as vLLM's layer does.
struct SiluMulQuantize {
  Quantize quantize;
};

// y = x with every run of block channels multiplied by the orthonormal Walsh-Hadamard matrix; block is a power of two
struct Hadamard {
  const void* x;  // [m, k]
  void* y;        // [m, k]
  Float type;     // of both
  int64_t m, k, block;
};

// y = sa * sw * (sum_k a*w - za * col_sum - zw * row_sum + k * za * zw) + bias
struct IntegerGemm {
  const uint8_t* codes;    // [m, k]
  const float* sa;         // [m]
  const int32_t* za;       // [m]
  const int32_t* row_sum;  // [m]
  const uint32_t* w;       // kQuads layout of the device
  const float* sw;         // [n]
  const uint8_t* zw;       // [n], null when symmetric
  const int32_t* col_sum;  // [n]
  const float* bias;       // [n] or null
  void* y;                 // [m, n] of y_type
  Float y_type;
  int64_t m, n, k;
  int bits;
};

// Checkpoint packing -> kernel layout of the device
struct Repack {
  const uint32_t* stream;  // [n, k * bits / 32]
  uint32_t* packed;        // packed_words(bits, n, k) of the device's layout
  int64_t n, k;
  int bits;
  bool pairs;  // kPairs or kQuads
};

// The sum of each row's codes in checkpoint packing
struct ColumnSums {
  const uint32_t* stream;  // [n, k * bits / 32]
  int32_t* sums;           // [n]
  int64_t n, k;
  int bits;
};

// quantized = (code - zero) * scale; error = code - weight / scale - zero, as far as one step, in units of kErrorOne
constexpr int kErrorOne = 1 << 14;
struct FakeQuantize {
  const float* weight;  // [groups, size]
  const float* scale;   // [groups]
  const float* zero;    // [groups]
  float* quantized;     // [groups, size]
  int16_t* error;       // [groups, size]
  int64_t groups, size;
  int max_code;
};

// The gradient passes where a weight was moved by no more than half a step. sums, each [groups]: of the gradients of
// weights above the largest code, of those below the smallest, and of the others times their error
struct FakeQuantizeBackward {
  const float* grad;     // [groups, size]
  const int16_t* error;  // [groups, size]
  float* grad_weight;    // [groups, size]
  float* sums;           // [3, groups]
  int64_t groups, size;
};

// A product with several weights: expert e meets the tokens [offsets[e], offsets[e + 1]), and what belongs to its weight
// follows that of expert e - 1. Tokens behind the last offset meet none.
struct Experts {
  const int32_t* offsets;  // [count + 1], from 0 up
  int64_t count;
};

}  // namespace sliderquant
