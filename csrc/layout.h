// Packed layouts as pure index functions, the same on host and device. This file is the only truth about them.
//
// Index names: n output channel, k input channel, b bit of a code, p period, j code within its period, d word within
// its period.
//
// Checkpoint: the codes of one output channel form a little-endian bit stream, code k in bits [bits*k, bits*k + bits).
// A period is the shortest run of codes that fills whole 32-bit words: 3 words for 3 bits, one word otherwise.
//
// CPU kernels: 32 output channels stand side by side (a panel, two 512-bit registers of 32-bit lanes), so that a
// register of weights meets one broadcast activation group and no sum ever crosses lanes. A panel is stored period by
// period, word by word: panel -> p -> d -> lane. Only the order of the bits within a period changes, differently for
// the two instruction families that consume them:
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
// CUDA kernels read the checkpoint's own packing.
#pragma once

#include <cstdint>

#include "portability.h"

namespace sliderquant::layout {

enum class Family { kPairs, kQuads };

constexpr int kPanelRows = 32;
constexpr int kVectorRows = 16;
static_assert(kPanelRows == 2 * kVectorRows, "a panel is two 512-bit registers of 32-bit lanes");

// Every K is a multiple of this, so that every width fills whole periods and every group whole blocks.
constexpr int kBlockCodes = 32;

SLIDERQUANT_HOST_DEVICE constexpr bool is_weight_bits(int64_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 8;
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

}  // namespace sliderquant::layout
