// What the weight-only products read and write per channel. Included by files compiled for AVX512 only.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "../args.h"
#include "avx512.h"
#include "blocking.h"

namespace sliderquant::cpu::avx512 {

// Zero points of one group of one half panel, in every byte of a lane.
SLIDERQUANT_INLINE inline __m512i load_zero_bytes(const Wna16& a, int64_t g, int64_t n) {
  const __m512i zero = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(tail_mask(n, a.n), a.zero + g * a.n + n));
  return _mm512_shuffle_epi8(zero, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C)));
}

// Scales of the same.
SLIDERQUANT_INLINE inline __m512 load_scale(const Wna16& a, int64_t g, int64_t n) {
  return _mm512_maskz_loadu_ps(tail_mask(n, a.n), a.scale + g * a.n + n);
}

inline void store_row(const Wna16& a, int64_t m, int64_t n, __m512 sum) {
  const __mmask16 mask = tail_mask(n, a.n);
  if (a.bias != nullptr) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, a.bias + n));
  const __m256i y = a.x_type == Float::kBf16 ? reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum))
                                             : _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(a.y + m * a.n + n, mask, y);
}

}  // namespace sliderquant::cpu::avx512
