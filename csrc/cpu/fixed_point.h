// W*A16 of few tokens in integers, where integer products are faster or making floats of codes takes long.
//
// x becomes fixed point: within a block of up to 128 channels of a group every value is a 23-bit integer times a power of
// two. That is exact for bf16 within 2^14 of the largest value of the block (2^11 for fp16), and smaller ones are off by
// 2^-22 of the largest at most. Three signed bytes, its digits, make such an integer; their products with the codes are
// added without any rounding. Zero points are subtracted from these sums, in fp32 that holds them exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../args.h"
#include "../layout.h"
#include "api.h"
#include "blocking.h"

namespace sliderquant::cpu {

constexpr int64_t kFixedPointTokens = 4;  // at most, with AVX512

namespace fixed_point {

constexpr int kDigits = 3;
constexpr int kIntegerBits = 22;  // of a magnitude: digits from -128 to 127 reach no further than 0x7F7F7F
constexpr int64_t kBlock = 128;
static_assert(kBlock * 255 * 128 < 1 << 24, "the sums of a block and their zero points must be exact in fp32");

// x as integers: for each token digit by digit the bytes [k], in the order of the quads, and for each block the step
// of the integers and the sums of the digits.
struct Activations {
  int8_t* digits;  // [m][d][k]
  float* step;     // [m][block]
  float* sum;      // [m][block][d]
  int64_t k, blocks;
};

// The block that holds channel k: within a group, and from a multiple of kBlock of it on.
SLIDERQUANT_INLINE inline int64_t block_size(const Wna16& a, int64_t k) {
  return std::min(kBlock, a.group - k % a.group);
}
SLIDERQUANT_INLINE inline int64_t block_count(const Wna16& a) {
  return a.k / a.group * ((a.group + kBlock - 1) / kBlock);
}

// A block's power of two, for its largest magnitude: below 2^exponent.
SLIDERQUANT_INLINE inline int exponent_of(float largest) {
  int exponent;
  std::frexp(largest, &exponent);
  return std::max(exponent, -100);  // the step must be a normal number
}

// Quads are four codes of the layout kPairs in the bytes of a lane: which two pairs of k, the first one in bytes 0 and 2,
// the second one in bytes 1 and 3.
struct PairsOfQuad {
  int first, second;
};

template <int Bits>
constexpr PairsOfQuad pairs_of_quad(int q) {
  constexpr int kHalf = 8 / Bits;  // quads of a word
  if (Bits != 3) return {q, q + kHalf};
  // Of the five pairs of a word 0 and 3, 1 and 4 are together; the third ones and the sixteenth pair remain.
  if (q < 6) return {5 * (q / 2) + q % 2, 5 * (q / 2) + q % 2 + 3};
  return q == 6 ? PairsOfQuad{2, 7} : PairsOfQuad{12, 15};
}

// Where the 32 bytes from a multiple of 32 on come from.
template <int Bits>
struct Order {
  alignas(64) int32_t from[layout::kBlockCodes] = {};
  constexpr Order() {
    for (int i = 0; i < layout::kBlockCodes; ++i) {
      const int period = i / layout::period_codes(Bits) * layout::period_codes(Bits), byte = i % 4;
      const PairsOfQuad pairs = pairs_of_quad<Bits>((i - period) / 4);
      from[i] = period + 2 * (byte % 2 == 0 ? pairs.first : pairs.second) + byte / 2;
    }
  }
};

}  // namespace fixed_point

// False, and nothing is done, where x holds an infinity or a NaN.
#define SLIDERQUANT_FIXED_POINT(isa)                           \
  namespace isa {                                              \
  bool fixed_point_wna16(const Wna16&, Panels, Parallel);      \
  }
SLIDERQUANT_FIXED_POINT(portable)  // not defined: it has no products of bytes
SLIDERQUANT_FIXED_POINT(avx2)      // 2 to 4 bits, one or two tokens
SLIDERQUANT_FIXED_POINT(avx512f)   // 2 or 3 bits, one token
SLIDERQUANT_FIXED_POINT(avx512)    // any width, up to kFixedPointTokens
#undef SLIDERQUANT_FIXED_POINT

}  // namespace sliderquant::cpu
