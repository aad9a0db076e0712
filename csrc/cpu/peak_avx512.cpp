// How fast one thread multiplies out of vector registers, for benchmarks: the roof over every kernel for AVX512.
#include "avx512.h"
#include "fastest.h"
#include "peak.h"

namespace sliderquant::cpu::avx512 {
namespace {

constexpr int kSums = 24;  // as many as the kernels have

}  // namespace

double peak_bf16(double seconds) {
  const __m512i pair = _mm512_set1_epi32(0x3F803F80);
  return peak<kSums, __m512>(seconds, 64, [&](__m512* sums) SLIDERQUANT_INLINE {
    asm volatile("" ::"v"(pair));
    unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE {
      sums[I] = _mm512_dpbf16_ps(sums[I], reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(pair));
    });
  });
}

double peak_int8(double seconds) {
  const __m512i quad = _mm512_set1_epi8(1);
  return peak<kSums, __m512i>(seconds, 128, [&](__m512i* sums) SLIDERQUANT_INLINE {
    asm volatile("" ::"v"(quad));
    unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE { sums[I] = _mm512_dpbusd_epi32(sums[I], quad, quad); });
  });
}

}  // namespace sliderquant::cpu::avx512
