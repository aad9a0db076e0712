// From packed codes (layout kQuads) to four bytes of neighbouring k for vpdpbusd and tdpbusd. Weight codes up to 4 bits
// are their own signed bytes; 8-bit ones are shifted by 128. Included by files compiled for AVX512 only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../layout.h"
#include "avx512.h"

namespace sliderquant::cpu::avx512 {

// Calls emit.template operator()<q>(quads) for each four k of one period of a panel; words are the period's words.
template <int Bits>
struct ExpandQuads {
  static_assert(Bits == 2 || Bits == 4, "3 and 8 bits have layouts of their own");
  static constexpr int kQuads = 8 / Bits;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    const Halves v = {load_half(words, 0), load_half(words, 1)};
    const __m512i mask = _mm512_set1_epi8((1 << Bits) - 1);
    unroll<kQuads>([&]<int Q>() SLIDERQUANT_INLINE {
      emit.template operator()<Q>(Halves{_mm512_and_si512(_mm512_srli_epi16(v[0], Bits * Q), mask),
                                         _mm512_and_si512(_mm512_srli_epi16(v[1], Bits * Q), mask)});
    });
  }
};

template <>
struct ExpandQuads<3> {
  static constexpr int kQuads = 8;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    Halves v[3];
    unroll<3>([&]<int D>() SLIDERQUANT_INLINE {
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE { v[D][T] = load_half(words + D * layout::kPanelRows, T); });
    });
    const __m512i two_bits = _mm512_set1_epi8(3);
    const __m512i high_bit = _mm512_set1_epi8(4);
    unroll<kQuads>([&]<int Q>() SLIDERQUANT_INLINE {
      Halves quads;
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
        const __m512i l = _mm512_and_si512(_mm512_srli_epi16(v[Q / 4][T], 2 * (Q % 4)), two_bits);
        const __m512i h = Q < 2 ? _mm512_slli_epi16(v[2][T], (10 - Q) % 8) : _mm512_srli_epi16(v[2][T], (6 + Q) % 8);
        quads[T] = _mm512_ternarylogic_epi32(h, high_bit, l, 0xEA);  // (h & high_bit) | l
      });
      emit.template operator()<Q>(quads);
    });
  }
};

template <>
struct ExpandQuads<8> {
  static constexpr int kQuads = 1;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    emit.template operator()<0>(
        Halves{_mm512_xor_si512(load_half(words, 0), flip), _mm512_xor_si512(load_half(words, 1), flip)});
  }
};

// Expands `chunk` codes of a panel, from a period on, to [quads of k, 32].
template <int Bits>
void expand_quads(const uint32_t* w, int64_t chunk, uint32_t* expanded) {
  const ExpandQuads<Bits> expand;
  for (int64_t k = 0; k < chunk; k += layout::period_codes(Bits)) {
    expand(w, [&]<int Q>(const Halves& quads) SLIDERQUANT_INLINE {
      _mm512_store_si512(expanded + Q * layout::kPanelRows, quads[0]);
      _mm512_store_si512(expanded + Q * layout::kPanelRows + layout::kVectorRows, quads[1]);
    });
    w += layout::period_words(Bits) * layout::kPanelRows;
    expanded += ExpandQuads<Bits>::kQuads * layout::kPanelRows;
  }
}

}  // namespace sliderquant::cpu::avx512
