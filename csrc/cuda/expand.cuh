// Packed codes as the operand of a product: read out of a panel's chunk, and expanded to pairs of 16-bit floats or to
// quads of bytes.
//
// Pairs are code - zero, exactly, with nothing rounded. A float whose mantissa's lowest bit counts 1 (1024 in fp16, 128
// in bf16) takes a code into that bit's place by a bitwise or, and a sum then removes the offset and the zero point at
// once. With a smaller exponent the same holds for a place further up, so a code is used where it stands as long as the
// mantissa reaches there, and words are shifted rarely: at most once (fp16) or twice (bf16) per word. Codes of 8 bits
// exceed the mantissa of bf16: they go through fp32 in the same way, and code - zero, of 8 bits and a sign, survives
// dropping its lower half.
#pragma once

#include <type_traits>

#include "../layout.h"
#include "ptx.cuh"

namespace sliderquant::cuda {

constexpr int kChunkBlocks = layout::gpu::kChunkCodes / layout::kBlockCodes;

// Of the words that a lane owns of a panel's chunk in shared memory, the vectors whose first words belong to block b.
template <int kBits>
SLIDERQUANT_DEVICE void read_words(uint32_t (&words)[2][kBits], const char* w_sh_rd, int b) {
  constexpr int kWidth = layout::gpu::vector_words(kBits), kVectors = 2 * kBits / kWidth;
  constexpr int kEvery = kBits == 8 ? 1 : kBits == 4 ? 2 : kChunkBlocks;  // blocks
  constexpr int kPerBlock = kVectors * kEvery / kChunkBlocks;
  if (b % kEvery != 0) return;
#pragma unroll
  for (int i = 0; i < kPerBlock; ++i) {
    const int vector = b / kEvery * kPerBlock + i;
    using Vector = std::conditional_t<kWidth == 4, Vec4, Vec2>;
    const auto held = *reinterpret_cast<const Vector*>(w_sh_rd + vector * kWarp * 4 * kWidth);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) words[e % 2][(vector * kWidth + e) / 2] = held.v[e];
  }
}

template <int kBits, Float kType>
struct Expand {
  static_assert(kType != Float::kFp32, "codes become 16-bit floats");
  static constexpr int kMantissa = kType == Float::kFp16 ? 10 : 7;
  static constexpr bool kWide = kBits > kMantissa;
  // Places at which a code can be used without a shift; at most four, so that every word is cut into equal parts.
  static constexpr int kPlaces = kWide ? 1 : kMantissa / kBits < 4 ? kMantissa / kBits : 4;

  // The exponent of 2^(mantissa - bit), twice: in that float, mantissa bit `bit` counts 1.
  SLIDERQUANT_HOST_DEVICE static constexpr uint32_t magic(int place) {
    return (kType == Float::kFp16 ? (25u - kBits * place) << 10 : (134u - kBits * place) << 7) * 0x10001u;
  }

  // What is added to a pair at each place: minus the offset and the zero point, a code itself.
  struct Offsets {
    uint32_t held[kPlaces];

    // Given the zero point in both 16-bit halves.
    SLIDERQUANT_DEVICE Offsets(uint32_t zeros) {
      if constexpr (kWide) {
        held[0] = 0xCB000000 | (zeros & 0xFFFF);  // -(2^23 + zero) in fp32
      } else {
        for (int place = 0; place < kPlaces; ++place) {
          held[place] = (magic(place) | 0x80008000u) + (zeros << kBits * place);
        }
      }
    }
  };

  // Pair number `index` of the 16 that a lane owns of a row in a chunk, from the kBits words they are packed into.
  SLIDERQUANT_DEVICE static uint32_t pair(const uint32_t (&words)[kBits], int index, const Offsets& offsets) {
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x10001u;
    constexpr int kOr = 0xEA;  // a & b | c
    if constexpr (kWide) {
      const uint32_t word = words[index / 2];
      const uint32_t selector = 0x7540 + static_cast<uint32_t>(index % 2);
      const float offset = bits_to_float(offsets.held[0]);
      const float low = bits_to_float(ptx::prmt(word, 0x4B000000, selector)) + offset;
      const float high = bits_to_float(ptx::prmt(word, 0x4B000000, selector + 2)) + offset;
      return ptx::prmt(float_to_bits(low), float_to_bits(high), 0x7632);
    } else if (kBits == 3 && index == 15) {
      uint32_t bits = ptx::lop3<kOr>(words[0] >> 15, 0x00010001, magic(0));
      bits = ptx::lop3<kOr>(words[1 % kBits] >> 14, 0x00020002, bits);
      bits = ptx::lop3<kOr>(words[2 % kBits] >> 13, 0x00040004, bits);
      return ptx::add2<kType>(bits, offsets.held[0]);
    } else {
      constexpr int kPairs = 16 / kBits;  // of a word
      const int within = index % kPairs, place = within % kPlaces;
      const uint32_t word = words[index / kPairs] >> kBits * (within - place);
      const uint32_t bits = ptx::lop3<kOr>(word, kMask << kBits * place, magic(place));
      return ptx::add2<kType>(bits, offsets.held[place]);
    }
  }
};

// Codes 4 * index to 4 * index + 3 of the 32 that a lane owns of a row in a chunk, one per byte.
template <int kBits>
SLIDERQUANT_DEVICE uint32_t expand_quad(const uint32_t (&words)[kBits], int index) {
  if constexpr (kBits == 3) {
    constexpr int kOr = 0xEA;  // a & b | c
    const uint32_t high = index < 2 ? words[2] << (2 - index) : words[2] >> (index - 2);
    return ptx::lop3<kOr>(high, 0x04040404, words[index / 4] >> 2 * (index % 4) & 0x03030303);
  } else {
    constexpr int kQuads = 8 / kBits;  // of a word
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
    return words[index / kQuads] >> kBits * (index % kQuads) & kMask;
  }
}

}  // namespace sliderquant::cuda
