// From the exact sums of an integer product to its output. All corrections are made modulo 2^32: the caller guarantees
// that the final bracket fits 32 bits, so intermediate wraps cancel. Included by files compiled for AVX512 only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../args.h"
#include "avx512.h"

namespace sliderquant::cpu::avx512 {

// What the epilogue needs of 16 channels, loaded once per panel.
struct Columns {
  __mmask16 mask;
  __m512i col_sum, zero;
  __m512 scale, bias;
};

inline Columns load_columns(const IntegerGemm& a, int64_t n) {
  Columns c;
  c.mask = tail_mask(n, a.n);
  c.col_sum = _mm512_maskz_loadu_epi32(c.mask, a.col_sum + n);
  c.zero = a.zw != nullptr ? _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(c.mask, a.zw + n))
                           : _mm512_set1_epi32(1 << (a.bits - 1));
  c.scale = _mm512_maskz_loadu_ps(c.mask, a.sw + n);
  c.bias = a.bias != nullptr ? _mm512_maskz_loadu_ps(c.mask, a.bias + n) : _mm512_setzero_ps();
  return c;
}

inline void store_row(const IntegerGemm& a, const Columns& c, int64_t m, int64_t n, __m512i sum) {
  // bracket = sum - za * col_sum + zw * (k * za - row_sum) [+ 128 * row_sum for the shifted 8-bit codes]
  const uint32_t za = static_cast<uint32_t>(a.za[m]);
  const uint32_t row_sum = static_cast<uint32_t>(a.row_sum[m]);
  const uint32_t per_zero = static_cast<uint32_t>(a.k) * za - row_sum;
  const uint32_t shifted = a.bits == 8 ? 128 * row_sum : 0;
  __m512i bracket = _mm512_add_epi32(sum, _mm512_set1_epi32(static_cast<int32_t>(shifted)));
  bracket = _mm512_sub_epi32(bracket, _mm512_mullo_epi32(c.col_sum, _mm512_set1_epi32(static_cast<int32_t>(za))));
  bracket = _mm512_add_epi32(bracket, _mm512_mullo_epi32(c.zero, _mm512_set1_epi32(static_cast<int32_t>(per_zero))));
  const __m512 scale = _mm512_mul_ps(c.scale, _mm512_set1_ps(a.sa[m]));
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(bracket), scale);
  if (a.bias != nullptr) y = _mm512_add_ps(y, c.bias);
  const int64_t at = m * a.n + n;
  switch (a.y_type) {
    case Float::kFp32: _mm512_mask_storeu_ps(static_cast<float*>(a.y) + at, c.mask, y); break;
    case Float::kBf16:
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.y) + at, c.mask,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
      break;
    case Float::kFp16:
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.y) + at, c.mask,
                               _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
      break;
  }
}

// Up to kSharingPanels panels from their sums, which lie panel_sums apart: [tokens, 32] each.
inline void store_panels(const IntegerGemm& a, int64_t begin, int64_t end, int64_t panel_sums, const int32_t* sums) {
  Columns columns[kSharingPanels * kTiles];
  const int64_t registers = (end - begin) * kTiles;
  for (int64_t i = 0; i < registers; ++i) {
    columns[i] = load_columns(a, begin * layout::kPanelRows + i * layout::kVectorRows);
  }
  for (int64_t m = 0; m < a.m; ++m, sums += layout::kPanelRows) {
    for (int64_t i = 0; i < registers; ++i) {
      const int32_t* sum = sums + i / kTiles * panel_sums + i % kTiles * layout::kVectorRows;
      store_row(a, columns[i], m, begin * layout::kPanelRows + i * layout::kVectorRows, _mm512_load_si512(sum));
    }
  }
}

}  // namespace sliderquant::cpu::avx512
