// Activations of a block of tokens, channel by channel: what the blocked AVX512 products read. Included by files
// compiled for AVX512 only.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "avx512.h"

namespace sliderquant::cpu::avx512 {

// Transposes 16 registers of 16 words each.
SLIDERQUANT_INLINE inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  unroll<8>([&]<int I>() SLIDERQUANT_INLINE {
    t[2 * I] = _mm512_unpacklo_epi32(r[2 * I], r[2 * I + 1]);
    t[2 * I + 1] = _mm512_unpackhi_epi32(r[2 * I], r[2 * I + 1]);
  });
  unroll<4>([&]<int I>() SLIDERQUANT_INLINE {
    r[4 * I] = _mm512_unpacklo_epi64(t[4 * I], t[4 * I + 2]);
    r[4 * I + 1] = _mm512_unpackhi_epi64(t[4 * I], t[4 * I + 2]);
    r[4 * I + 2] = _mm512_unpacklo_epi64(t[4 * I + 1], t[4 * I + 3]);
    r[4 * I + 3] = _mm512_unpackhi_epi64(t[4 * I + 1], t[4 * I + 3]);
  });
  // Now the 128-bit lane l of r[4 * i + c] holds column 4 * l + c of the rows 4 * i to 4 * i + 3.
  unroll<4>([&]<int C>() SLIDERQUANT_INLINE {
    const __m512i even_low = _mm512_shuffle_i32x4(r[C], r[4 + C], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(r[C], r[4 + C], 0xDD);
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + C], r[12 + C], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + C], r[12 + C], 0xDD);
    t[C] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[8 + C] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
    t[4 + C] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[12 + C] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
  });
  unroll<16>([&]<int I>() SLIDERQUANT_INLINE { r[I] = t[I]; });
}

// packed[word * word_stride + token] = word of the row of token, for up to 16 tokens whose rows of words lie
// row_bytes apart.
inline void pack_tokens(const void* rows, int64_t row_bytes, int64_t tokens, int64_t words, int64_t word_stride,
                        uint32_t* packed) {
  const char* row = static_cast<const char*>(rows);
  for (int64_t first = 0; first < words; first += 16, packed += 16 * word_stride) {
    const int64_t count = std::min<int64_t>(16, words - first);
    const __mmask16 mask = tail_mask(0, count), existing = tail_mask(0, tokens);
    __m512i r[16];
    for (int64_t token = 0; token < 16; ++token) {
      r[token] = token < tokens ? _mm512_maskz_loadu_epi32(mask, row + token * row_bytes + 4 * first)
                                : _mm512_setzero_si512();
    }
    transpose(r);
    for (int64_t word = 0; word < count; ++word) {
      _mm512_mask_storeu_epi32(packed + word * word_stride, existing, r[word]);
    }
  }
}

}  // namespace sliderquant::cpu::avx512
