// Packed layouts as pure index functions, the same on host and device. This file is the only truth about them.
//
// Index names: n output channel, k input channel, b bit of a code, p period, j code within its period, d word within
// its period.
//
// Checkpoint: the codes of one output channel form a little-endian bit stream, code k in bits [bits*k, bits*k + bits).
// A period is the shortest run of codes that fills whole 32-bit words: 3 words for 3 bits, one word otherwise.
//
// CPU kernels (namespace layout itself): 32 output channels stand side by side (a panel, two 512-bit registers of
// 32-bit lanes), so that a register of weights meets one broadcast activation group and no sum ever crosses lanes. A
// panel is stored period by period, word by word: panel -> p -> d -> lane. Only the order of the bits within a period
// changes, differently for the two instruction families that consume them:
//
//   kPairs (16-bit activations): a 32-bit lane must become two 16-bit values of neighbouring k, so code k lies in the
//     16-bit half k % 2 and one shift by a constant brings a pair to the bottom of both halves:
//       2, 4, 8 bits: code j at bit 16*(j % 2) + bits*(j / 2)
//       3 bits: five pairs per word at bits 0, 3, .. 12 of each half; the sixteenth pair has one bit on top (bit 15)
//       of each of the three words.
//   kQuads (integer activations): a 32-bit lane must become four bytes of neighbouring k, so code k lies in byte k % 4:
//       2, 4, 8 bits: code j at bit 8*(j % 4) + bits*(j / 4)
//       3 bits: words 0 and 1 hold the two low bits like 2-bit codes, word 2 the high bits, one per k / 4.
//
// CUDA kernels (layout::gpu): a tensor core multiplies 16 channels by 8 tokens, and lane 4 g + t of a warp holds rows g
// and g + 8 of the weights. So 16 channels make a panel, 128 k of it a chunk, and the lane owns of every 32 k of a
// chunk the eight from 8 t on, of both its rows. The tokens' operand then takes 16 contiguous bytes of x per lane and
// 32 k (two steps of 16-bit products, one of integer ones), a product never reaches over 32 k, the smallest group, and
// a lane's 32 codes of a row in a chunk are whole periods of every width. Within a period bits have the order above. A
// chunk is stored vector by vector, a vector being 16 bytes (8 for 3 bits) of every lane: panel -> chunk -> vector ->
// lane -> word, where the 2 * bits words of a lane go d -> row, those of row g + 8 beside those of row g. Where k or n
// goes beyond the matrix, to whole chunks and panels, codes are zero.
#pragma once

#include <cstdint>
#include <type_traits>

#include "portability.h"

namespace sliderquant::layout {

enum class Family { kPairs, kQuads };

constexpr int kPanelRows = 32;
constexpr int kVectorRows = 16;
static_assert(kPanelRows == 2 * kVectorRows, "a panel is two 512-bit registers of 32-bit lanes");

// Every K is a multiple of this, so that every width fills whole periods and every group whole blocks.
constexpr int kBlockCodes = 32;

// Of Hadamard transforms, as the format has them.
constexpr int kMostBlock = 4096;

SLIDERQUANT_HOST_DEVICE constexpr bool is_weight_bits(int64_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

// f(bits) with a width that a template can take: that of weights for which there are kernels.
template <class F>
[[gnu::always_inline]] inline auto with_bits(int bits, F&& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

SLIDERQUANT_HOST_DEVICE constexpr int period_words(int bits) { return bits == 3 ? 3 : 1; }
SLIDERQUANT_HOST_DEVICE constexpr int period_codes(int bits) { return 32 * period_words(bits) / bits; }
static_assert(kBlockCodes % period_codes(2) == 0 && kBlockCodes % period_codes(3) == 0 &&
                  kBlockCodes % period_codes(4) == 0 && kBlockCodes % period_codes(8) == 0,
              "a block of codes must be whole periods of every width");

SLIDERQUANT_HOST_DEVICE constexpr int64_t row_words(int bits, int64_t in_features) { return in_features * bits / 32; }

// Code k of a checkpoint row.
SLIDERQUANT_HOST_DEVICE constexpr uint32_t stream_code(const uint32_t* row, int bits, int64_t k) {
  const int64_t bit = k * bits;
  const int shift = static_cast<int>(bit % 32);
  uint32_t value = row[bit / 32] >> shift;
  if (shift + bits > 32) value |= row[bit / 32 + 1] << (32 - shift);
  return value & ((1u << bits) - 1);
}

// Where bit b of code j of a period lies in that period's 32 * period_words bits, in kernel layout.
SLIDERQUANT_HOST_DEVICE constexpr int kernel_bit(Family family, int bits, int j, int b) {
  if (family == Family::kPairs) {
    const int half = 16 * (j % 2);
    if (bits != 3) return half + bits * (j / 2) + b;
    const int pair = j / 2;
    return pair < 15 ? 32 * (pair / 5) + half + 3 * (pair % 5) + b : 32 * b + half + 15;
  }
  const int byte = 8 * (j % 4);
  const int quad = j / 4;
  if (bits != 3) return byte + bits * quad + b;
  return b < 2 ? 32 * (quad / 4) + byte + 2 * (quad % 4) + b : 64 + byte + quad;
}

SLIDERQUANT_HOST_DEVICE constexpr int64_t panels(int64_t out_features) {
  return (out_features + kPanelRows - 1) / kPanelRows;
}

// 32-bit words of a packed weight in kernel layout; channels beyond out_features are zero codes.
SLIDERQUANT_HOST_DEVICE constexpr int64_t packed_words(int bits, int64_t out_features, int64_t in_features) {
  return panels(out_features) * row_words(bits, in_features) * kPanelRows;
}

// Word d of period p of channel n, in kernel layout.
SLIDERQUANT_HOST_DEVICE constexpr int64_t word_index(int bits, int64_t in_features, int64_t n, int64_t p, int d) {
  return (n / kPanelRows * row_words(bits, in_features) + p * period_words(bits) + d) * kPanelRows + n % kPanelRows;
}

namespace gpu {

constexpr int kPanelRows = 16;
constexpr int kChunkCodes = 128;
constexpr int kLanes = 32;
constexpr int kLaneCodes = 8;  // neighbouring k that one lane owns of a row
constexpr int kRowCodes = 32;  // that one lane owns of a row in a chunk
static_assert(kLaneCodes * kLanes == kPanelRows / 2 * kBlockCodes, "lanes share out 32 k of half the rows of a panel");
static_assert(kRowCodes == kChunkCodes / kBlockCodes * kLaneCodes, "a chunk is several blocks of 32 k");
static_assert(kRowCodes % period_codes(2) == 0 && kRowCodes % period_codes(3) == 0 &&
                  kRowCodes % period_codes(4) == 0 && kRowCodes % period_codes(8) == 0,
              "what a lane owns must be whole periods of every width");

SLIDERQUANT_HOST_DEVICE constexpr int64_t panels(int64_t out_features) {
  return (out_features + kPanelRows - 1) / kPanelRows;
}

SLIDERQUANT_HOST_DEVICE constexpr int64_t chunks(int64_t in_features) {
  return (in_features + kChunkCodes - 1) / kChunkCodes;
}

// Words of one panel's chunk; words of a lane that one vector holds.
SLIDERQUANT_HOST_DEVICE constexpr int chunk_words(int bits) { return kPanelRows * kChunkCodes * bits / 32; }
SLIDERQUANT_HOST_DEVICE constexpr int vector_words(int bits) { return bits == 3 ? 2 : 4; }
static_assert(chunk_words(3) % (kLanes * vector_words(3)) == 0 && chunk_words(2) % (kLanes * vector_words(2)) == 0,
              "a chunk must be whole vectors");

// 32-bit words of a packed weight.
SLIDERQUANT_HOST_DEVICE constexpr int64_t packed_words(int bits, int64_t out_features, int64_t in_features) {
  return panels(out_features) * chunks(in_features) * chunk_words(bits);
}

// The thread t that owns input channel k, and where among its 32 codes of the row and chunk that one is.
SLIDERQUANT_HOST_DEVICE constexpr int owner(int64_t k) { return static_cast<int>(k / kLaneCodes % 4); }
SLIDERQUANT_HOST_DEVICE constexpr int run_index(int64_t k) {
  return static_cast<int>(k % kChunkCodes / kBlockCodes * kLaneCodes + k % kLaneCodes);
}

// Word d, of `bits`, that thread t owns of channel n in a chunk.
SLIDERQUANT_HOST_DEVICE constexpr int64_t word_index(int bits, int64_t in_features, int64_t n, int64_t chunk, int t,
                                                     int d) {
  const int width = vector_words(bits);
  const int lane = static_cast<int>(n % 8) * 4 + t;
  const int word = 2 * d + static_cast<int>(n / 8 % 2);
  return (n / kPanelRows * chunks(in_features) + chunk) * chunk_words(bits) + word / width * kLanes * width +
         lane * width + word % width;
}

// The code of channel n and input channel k.
SLIDERQUANT_HOST_DEVICE constexpr uint32_t code(const uint32_t* packed, Family family, int bits, int64_t in_features,
                                                int64_t n, int64_t k) {
  const int period = run_index(k) / period_codes(bits), j = run_index(k) % period_codes(bits);
  const int pieces = bits == 3 ? 3 : 1;  // all bits of a code stand together but for 3 bits
  const uint32_t mask = (1u << bits / pieces) - 1;
  uint32_t value = 0;
  for (int b = 0; b < pieces; ++b) {
    const int bit = kernel_bit(family, bits, j, b);
    const int d = period * period_words(bits) + bit / 32;
    const int64_t word = word_index(bits, in_features, n, k / kChunkCodes, owner(k), d);
    value |= (packed[word] >> bit % 32 & mask) << b;
  }
  return value;
}

// Word `index` of the packed weight whose checkpoint packing is stream.
SLIDERQUANT_HOST_DEVICE constexpr uint32_t packed_word(const uint32_t* stream, Family family, int bits,
                                                       int64_t out_features, int64_t in_features, int64_t index) {
  const int64_t chunk = index / chunk_words(bits);  // counted through all panels
  const int within = static_cast<int>(index % chunk_words(bits)), width = vector_words(bits);
  const int lane = within / width % kLanes;
  const int word = within / (kLanes * width) * width + within % width;
  const int64_t n = chunk / chunks(in_features) * kPanelRows + 8 * (word % 2) + lane / 4;
  if (n >= out_features) return 0;
  const int period = word / 2 / period_words(bits);
  uint32_t value = 0;
  for (int j = 0; j < period_codes(bits); ++j) {
    const int run = period * period_codes(bits) + j;
    const int64_t k = chunk % chunks(in_features) * kChunkCodes + run / kLaneCodes * kBlockCodes +
                      lane % 4 * kLaneCodes + run % kLaneCodes;
    if (k >= in_features) continue;
    const uint32_t code = stream_code(stream + n * row_words(bits, in_features), bits, k);
    for (int b = 0; b < bits; ++b) {
      const int bit = kernel_bit(family, bits, j, b);
      if (bit / 32 == word / 2 % period_words(bits)) value |= (code >> b & 1) << bit % 32;
    }
  }
  return value;
}

}  // namespace gpu

}  // namespace sliderquant::layout
