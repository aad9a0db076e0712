// Vectors for the kernels that are compiled once for each instruction set. SLIDERQUANT_LANES says how many 32-bit lanes
// a register has there, SLIDERQUANT_RUNG in which namespace they live.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef SLIDERQUANT_X86
#include <immintrin.h>
#endif

#include "../layout.h"
#include "blocking.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

constexpr int kLanes = SLIDERQUANT_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

// A tile: output channels that stand in registers side by side, all of a panel or half of it, and the tokens that share
// them. Registers: 24 sums of 32 with AVX512, 12 of 16 else.
constexpr int kVectors = std::min(layout::kPanelRows / kLanes, 4);
constexpr int kTileRows = kVectors * kLanes;
constexpr int kTileTokens = kLanes == 16 ? 12 : 3;
using TokenBlocks = Blocks<kTileTokens>;

template <class Vector, class Element>
SLIDERQUANT_INLINE inline Vector load(const Element* from) {
  Vector value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector, class Element>
SLIDERQUANT_INLINE inline void store(Element* to, const Vector& value) {
  memcpy(to, &value, sizeof value);
}

SLIDERQUANT_INLINE inline Floats splat(float x) { return x - Floats{}; }
SLIDERQUANT_INLINE inline Words splat(uint32_t x) { return x + Words{}; }

// Codes j of a period whose words are given, one in each 32-bit lane; with kRepeat = 0x00010001 two, 16 bits apart.
// They are those kShift bits above the place that the layout names. Where codes need not be kMasked, bits above one may
// be anything.
template <layout::Family kFamily, int Bits, int J, uint32_t kRepeat, int kShift, bool kMasked>
SLIDERQUANT_INLINE inline Words codes_at(const Words* words) {
  constexpr auto bit = [](int b) { return layout::kernel_bit(kFamily, Bits, J, b) + kShift; };
  constexpr int kRun = [bit] {  // bits that lie together
    int count = 1;
    while (count < Bits && bit(count) == bit(0) + count) ++count;
    return count;
  }();
  Words codes = words[bit(0) / 32] >> (bit(0) % 32);
  if constexpr (kMasked || kRun < Bits) codes &= ((1u << kRun) - 1) * kRepeat;
  unroll<Bits - kRun>([&]<int B>() SLIDERQUANT_INLINE {
    codes |= (words[bit(B + kRun) / 32] >> (bit(B + kRun) % 32) & kRepeat) << (B + kRun);
  });
  return codes;
}

}  // namespace
}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
