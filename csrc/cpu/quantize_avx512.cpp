// Per-token quantization for AVX512 (F, BW, DQ, VL).
//
// Bit for bit the reference: IEEE division, round half to even. A NaN gets code 0 and does not widen the range.
#include "../formula.h"
#include "api.h"
#include "avx512.h"

namespace sliderquant::cpu::avx512 {
namespace {

constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

SLIDERQUANT_INLINE inline __m512 load(const uint16_t* x, Float type, __mmask16 mask) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask, x);
  return type == Float::kFp16 ? _mm512_cvtph_ps(half)
                              : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

void quantize_row(const Quantize& a, int64_t m) {
  const uint16_t* x = a.x + m * a.x_stride;
  uint8_t* codes = a.codes + m * a.k;

  // The range always includes 0, which also makes masked lanes harmless. min and max return their second operand when
  // the first is NaN.
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  for (int64_t k = 0; k < a.k; k += 16) {
    const __m512 value = load(x + k, a.x_type, tail_mask(k, a.k));
    low = _mm512_min_ps(value, low);
    high = _mm512_max_ps(value, high);
  }
  const float lowest = _mm512_reduce_min_ps(low), highest = _mm512_reduce_max_ps(high);

  const TokenGrid grid = token_grid(lowest, highest, a.bits, a.symmetric);

  __m512i sum = _mm512_setzero_si512();
  const __m512 scales = _mm512_set1_ps(grid.scale), zeros = _mm512_set1_ps(grid.zero);
  for (int64_t k = 0; k < a.k; k += 16) {
    const __mmask16 mask = tail_mask(k, a.k);
    const __m512 value = load(x + k, a.x_type, mask);
    __m512 code = _mm512_add_ps(_mm512_roundscale_ps(_mm512_div_ps(value, scales), kRound), zeros);
    code = _mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), _mm512_set1_ps(grid.max_code));
    const __m512i integer = _mm512_maskz_cvtps_epi32(mask, code);
    sum = _mm512_add_epi32(sum, integer);
    _mm_mask_storeu_epi8(codes + k, mask, _mm512_cvtepi32_epi8(integer));
  }
  a.scale[m] = grid.scale;
  a.zero[m] = static_cast<int32_t>(grid.zero);
  a.row_sum[m] = _mm512_reduce_add_epi32(sum);
}

}  // namespace

void quantize(const Quantize& a, Parallel parallel) {
  constexpr int64_t kGrainValues = 16384;
  parallel_for(parallel, a.m, 1 + kGrainValues / (a.k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) quantize_row(a, m);
  });
}

}  // namespace sliderquant::cpu::avx512
