// What the AVX512 products read of the activations: rows split into bf16 terms, sums of their groups, and blocks of
// tokens channel by channel. Included by files compiled for AVX512 only.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../numeric.h"
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

// Splits a row of fp16 into two bf16 terms whose sum it is, exactly: 11 significant bits are at most 8 and the rest.
inline void split_row(const uint16_t* x, int64_t k_count, uint16_t* high, uint16_t* low) {
  for (int64_t k = 0; k < k_count; k += 16) {
    const __m512 value = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k)));
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
    const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
    // Infinities and NaN stay in the first term alone: inf - inf would turn an overflow into a NaN.
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(back), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    const __m512 rest = _mm512_maskz_sub_ps(finite, value, back);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + k), rounded);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + k), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest)));
  }
}

// sums[g * stride] for every group g of a row.
inline void sum_groups(const uint16_t* x, Float type, int64_t groups, int64_t group, int64_t stride, float* sums) {
  for (int64_t g = 0; g < groups; ++g) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = g * group; k < (g + 1) * group; k += 16) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
      const __m512 value = type == Float::kFp16
                               ? _mm512_cvtph_ps(half)
                               : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      sum = _mm512_add_ps(sum, value);
    }
    sums[g * stride] = _mm512_reduce_add_ps(sum);
  }
}

}  // namespace sliderquant::cpu::avx512
