// The arithmetic of the ops for one element, the same on host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "args.h"
#include "portability.h"

namespace sliderquant {

// w[n, k] = (code - zero) * scale
SLIDERQUANT_HOST_DEVICE float dequantize(uint32_t code, uint32_t zero, float scale) {
  return static_cast<float>(static_cast<int32_t>(code) - static_cast<int32_t>(zero)) * scale;
}

// How one row of x is quantized; zero and max_code are integers.
struct TokenGrid {
  float scale, zero, max_code;
};

// low <= 0 <= high, the range of the row.
SLIDERQUANT_HOST_DEVICE TokenGrid token_grid(float low, float high, int bits, bool symmetric) {
  TokenGrid grid;
  grid.max_code = static_cast<float>((1 << bits) - 1);
  if (symmetric) {
    grid.scale = (-low > high ? -low : high) / static_cast<float>((1 << (bits - 1)) - 1);
    if (!(grid.scale > 0)) grid.scale = 1;
    grid.zero = static_cast<float>(1 << (bits - 1));
  } else {
    grid.scale = (high - low) / grid.max_code;
    if (!(grid.scale > 0)) grid.scale = 1;
    const float exact = -low / grid.scale;
    grid.zero = exact == exact ? rintf(exact) : 0;  // inf / inf, from a row that holds -inf
  }
  return grid;
}

// The code of one value as a float; NaN gets 0.
SLIDERQUANT_HOST_DEVICE float token_code(float x, const TokenGrid& grid) {
  const float code = rintf(x / grid.scale) + grid.zero;
  if (!(code > 0)) return 0;
  return code < grid.max_code ? code : grid.max_code;
}

// a * b, which no compiler may fuse with the sum that takes it: every device rounds alike.
SLIDERQUANT_HOST_DEVICE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// What an output of the integer product takes from its token, and from its channel.
struct IntegerToken {
  float scale;
  uint32_t zero, sum;
};
struct IntegerChannel {
  float scale, bias;
  uint32_t zero, sum;
};

// From sum_k a*w. Unsigned arithmetic wraps, and the caller guarantees that the final bracket fits 32 bits, so it is
// exact whatever its terms.
SLIDERQUANT_HOST_DEVICE float integer_output(const IntegerToken& a, const IntegerChannel& w, int64_t k, bool biased,
                                             uint32_t sum) {
  const uint32_t bracket = sum - a.zero * w.sum - w.zero * a.sum + static_cast<uint32_t>(k) * a.zero * w.zero;
  const float y = multiply(static_cast<float>(static_cast<int32_t>(bracket)), multiply(a.scale, w.scale));
  return biased ? y + w.bias : y;
}

// y[m, n]
SLIDERQUANT_HOST_DEVICE float integer_output(const IntegerGemm& a, int64_t m, int64_t n, uint32_t sum) {
  const IntegerToken token = {a.sa[m], static_cast<uint32_t>(a.za[m]), static_cast<uint32_t>(a.row_sum[m])};
  const IntegerChannel channel = {a.sw[n], a.bias != nullptr ? a.bias[n] : 0,
                                  a.zw != nullptr ? a.zw[n] : 1u << (a.bits - 1),
                                  static_cast<uint32_t>(a.col_sum[n])};
  return integer_output(token, channel, a.k, a.bias != nullptr, sum);
}

}  // namespace sliderquant
