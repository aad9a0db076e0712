// From packed codes (layout kQuads) to four bytes of neighbouring k for vpdpbusd and tdpbusd. Weight codes up to 4 bits
// are their own signed bytes; 8-bit ones are shifted by 128. Included by files compiled for AVX512 only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../layout.h"
#include "avx512.h"

namespace sliderquant::cpu::avx512 {

// Calls emit.template operator()<q>(quad) for each four k of one period of one register's 16 channels; words are the
// period's words of the first of them.
template <int Bits>
struct ExpandQuads {
  static_assert(Bits == 2 || Bits == 4, "3 and 8 bits have layouts of their own");
  static constexpr int kQuads = 8 / Bits;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    const __m512i v = _mm512_loadu_si512(words);
    const __m512i mask = _mm512_set1_epi8((1 << Bits) - 1);
    unroll<kQuads>([&]<int Q>() SLIDERQUANT_INLINE {
      emit.template operator()<Q>(_mm512_and_si512(_mm512_srli_epi16(v, Bits * Q), mask));
    });
  }
};

template <>
struct ExpandQuads<3> {
  static constexpr int kQuads = 8;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    const __m512i low[2] = {_mm512_loadu_si512(words), _mm512_loadu_si512(words + layout::kPanelRows)};
    const __m512i high = _mm512_loadu_si512(words + 2 * layout::kPanelRows);
    const __m512i two_bits = _mm512_set1_epi8(3);
    const __m512i high_bit = _mm512_set1_epi8(4);
    unroll<kQuads>([&]<int Q>() SLIDERQUANT_INLINE {
      const __m512i l = _mm512_and_si512(_mm512_srli_epi16(low[Q / 4], 2 * (Q % 4)), two_bits);
      const __m512i h = Q < 2 ? _mm512_slli_epi16(high, (10 - Q) % 8) : _mm512_srli_epi16(high, (6 + Q) % 8);
      emit.template operator()<Q>(_mm512_ternarylogic_epi32(h, high_bit, l, 0xEA));  // (h & high_bit) | l
    });
  }
};

template <>
struct ExpandQuads<8> {
  static constexpr int kQuads = 1;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    emit.template operator()<0>(
        _mm512_xor_si512(_mm512_loadu_si512(words), _mm512_set1_epi8(static_cast<char>(0x80))));
  }
};

// Expands `chunk` codes of a panel, from a period on, to [quads of k, 32].
template <int Bits>
void expand_quads(const uint32_t* w, int64_t chunk, uint32_t* expanded) {
  const ExpandQuads<Bits> expand;
  for (int64_t k = 0; k < chunk; k += layout::period_codes(Bits)) {
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      expand(w + T * layout::kVectorRows, [&]<int Q>(__m512i quad) SLIDERQUANT_INLINE {
        _mm512_store_si512(expanded + Q * layout::kPanelRows + T * layout::kVectorRows, quad);
      });
    });
    w += layout::period_words(Bits) * layout::kPanelRows;
    expanded += ExpandQuads<Bits>::kQuads * layout::kPanelRows;
  }
}

}  // namespace sliderquant::cpu::avx512
