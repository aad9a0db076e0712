// From packed codes (layout kPairs) to pairs of bf16 for vdpbf16ps and tdpbf16ps. Included by files compiled for AVX512
// only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../layout.h"
#include "../numeric.h"
#include "avx512.h"

namespace sliderquant::cpu::avx512 {

// From codes to integers in bf16: code - 2^(bits-1), or code - zero where a zero point is given for each channel.
// vpermw takes the low five bits of each 16-bit lane as index, so bits above a code do not matter as long as the table
// repeats; a difference of codes needs all five.
template <int Bits, bool HasZero>
struct Lookup {
  __m512i table;
  Lookup() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      const int value = HasZero ? (i < 16 ? i : i - 32) : (i & ((1 << Bits) - 1)) - (1 << (Bits - 1));
      values[i] = static_cast<uint16_t>(float_to_bits(static_cast<float>(value)) >> 16);
    }
    table = _mm512_load_si512(values);
  }
  // What is looked up stands at the bottom of 16-bit lanes.
  SLIDERQUANT_INLINE __m512i operator()(__m512i codes) const { return _mm512_permutexvar_epi16(codes, table); }
};

// Calls emit.template operator()<q>(pairs) for each pair of k of one period of a panel, in some order; words are the
// period's words, zero the zero points, in every byte of a lane.
template <int Bits, bool HasZero>
struct Expand {
  static_assert(Bits == 2 || Bits == 4, "3 and 8 bits have layouts of their own");
  static constexpr int kPairs = 16 / Bits;
  Lookup<Bits, HasZero> value;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, const Halves& zero, Emit&& emit) const {
    const Halves v = {load_half(words, 0), load_half(words, 1)};
    const __m512i mask = _mm512_set1_epi8((1 << Bits) - 1);
    // Zero points are subtracted from two codes at once, those at the bottom of the bytes of a 16-bit lane.
    unroll<kPairs / 2>([&]<int Q>() SLIDERQUANT_INLINE {
      Halves low, high;
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
        __m512i codes = _mm512_srli_epi16(v[T], Bits * Q);
        if constexpr (HasZero) codes = _mm512_sub_epi8(_mm512_and_si512(codes, mask), zero[T]);
        low[T] = value(codes);
        high[T] = value(_mm512_srli_epi16(codes, 8));
      });
      emit.template operator()<Q>(low);
      emit.template operator()<Q + kPairs / 2>(high);
    });
  }
};

template <bool HasZero>
struct Expand<3, HasZero> {
  static constexpr int kPairs = 16;
  Lookup<3, HasZero> value;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, const Halves& zero, Emit&& emit) const {
    Halves v[3];
    unroll<3>([&]<int D>() SLIDERQUANT_INLINE {
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE { v[D][T] = load_half(words + D * layout::kPanelRows, T); });
    });
    const auto centred = [&]<int T>(__m512i codes) SLIDERQUANT_INLINE {
      return HasZero ? _mm512_sub_epi8(_mm512_and_si512(codes, _mm512_set1_epi16(7)), zero[T]) : codes;
    };
    Halves pairs;
    unroll<kPairs - 1>([&]<int Q>() SLIDERQUANT_INLINE {
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
        pairs[T] = value(centred.template operator()<T>(_mm512_srli_epi16(v[Q / 5][T], 3 * (Q % 5))));
      });
      emit.template operator()<Q>(pairs);
    });
    // The sixteenth pair: one bit on top of each word. 0xEA is (a & b) | c.
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      const __m512i two = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v[1][T], 14), _mm512_set1_epi16(2),
                                                    _mm512_srli_epi16(v[0][T], 15), 0xEA);
      const __m512i three =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(v[2][T], 13), _mm512_set1_epi16(4), two, 0xEA);
      pairs[T] = value(centred.template operator()<T>(three));
    });
    emit.template operator()<kPairs - 1>(pairs);
  }
};

// A table of 256 has no instruction. Behind the exponent of 2^23 a code in the lowest byte is 2^23 + code in fp32, and
// behind that of 2^15 one in the second byte 2^15 + code; the same of the zero point, subtracted, leaves an integer below
// 2^8, which ends in 16 zero bits: a pair is one shift and one or.
template <bool HasZero>
struct Expand<8, HasZero> {
  static constexpr int kPairs = 2;
  static constexpr int kLowest = 0x4B000000, kSecond = 0x47000000;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, const Halves& zero, Emit&& emit) const {
    const auto lowest = [](__m512i v) SLIDERQUANT_INLINE {  // 0xEA is (a & b) | c
      return _mm512_castsi512_ps(
          _mm512_ternarylogic_epi32(v, _mm512_set1_epi32(0xFF), _mm512_set1_epi32(kLowest), 0xEA));
    };
    const auto second = [](__m512i v) SLIDERQUANT_INLINE {
      return _mm512_castsi512_ps(
          _mm512_ternarylogic_epi32(v, _mm512_set1_epi32(0xFF00), _mm512_set1_epi32(kSecond), 0xEA));
    };
    Halves first, last;
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      const __m512i z = HasZero ? zero[T] : _mm512_set1_epi8(static_cast<char>(0x80));
      const auto pair = [&](__m512 low, __m512 high) SLIDERQUANT_INLINE {
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
      };
      // In layout order the bytes of a word are k = 0, 2, 1, 3.
      const __m512i v = load_half(words, T);
      const __m512 k0 = _mm512_sub_ps(lowest(v), lowest(z)), k2 = _mm512_sub_ps(second(v), second(z));
      const __m512i rest = _mm512_srli_epi32(v, 16);
      const __m512 k1 = _mm512_sub_ps(lowest(rest), lowest(z)), k3 = _mm512_sub_ps(second(rest), second(z));
      first[T] = pair(k0, k1);
      last[T] = pair(k2, k3);
    });
    emit.template operator()<0>(first);
    emit.template operator()<1>(last);
  }
};

// Pairs as they are.
struct Unscaled {
  template <int T>
  SLIDERQUANT_INLINE __m512i operator()(__m512i pair) const {
    return pair;
  }
};

// Pairs times the scales of their channels, in bf16. Products are cut off, not rounded: the scale is a little larger
// instead, by what makes up for it on average. A product that bf16 can hold stays as it is.
struct Scaled {
  __m512 scale[kTiles];
  template <int T>
  SLIDERQUANT_INLINE void set(__m512 exact) {
    scale[T] = _mm512_mul_ps(exact, _mm512_set1_ps(1 + 0.69f / 256));
  }
  template <int T>
  SLIDERQUANT_INLINE __m512i operator()(__m512i pair) const {
    const auto scaled = [&](__m512i bits) SLIDERQUANT_INLINE {
      return _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(bits), scale[T]));
    };
    const __m512i odd = _mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
    return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(scaled(_mm512_slli_epi32(pair, 16)), 16), scaled(odd));
  }
};

// Expands `chunk` codes of a panel, from a period on and with the same zero points, to [pairs of k, 32].
template <int Bits, bool HasZero, class Scale = Unscaled>
SLIDERQUANT_INLINE inline void expand_pairs(const Expand<Bits, HasZero>& expand, const uint32_t* w, int64_t chunk,
                                            const Halves& zero, uint32_t* expanded,
                                            const Scale& scale = {}) {
  for (int64_t k = 0; k < chunk; k += layout::period_codes(Bits)) {
    expand(w, zero, [&]<int Q>(const Halves& pairs) SLIDERQUANT_INLINE {
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
        _mm512_store_si512(expanded + Q * layout::kPanelRows + T * layout::kVectorRows,
                           scale.template operator()<T>(pairs[T]));
      });
    });
    w += layout::period_words(Bits) * layout::kPanelRows;
    expanded += Expand<Bits, HasZero>::kPairs * layout::kPanelRows;
  }
}

}  // namespace sliderquant::cpu::avx512
