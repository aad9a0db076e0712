// The same for AVX2, which has neither products of bf16 nor sums of four bytes: values of 16 bits are multiplied in fp32,
// and the products of bytes, two of them added up in 16 bits, take an instruction more to be added to a sum.
#include <immintrin.h>

#include "fastest.h"
#include "peak.h"

namespace sliderquant::cpu::avx2 {
namespace {

constexpr int kSums = 12;  // as many as the kernels have

}  // namespace

double peak_bf16(double seconds) {
  const __m256 one = _mm256_set1_ps(1);
  return peak<kSums, __m256>(seconds, 16, [&](__m256* sums) SLIDERQUANT_INLINE {
    asm volatile("" ::"v"(one));
    unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE { sums[I] = _mm256_fmadd_ps(one, one, sums[I]); });
  });
}

double peak_int8(double seconds) {
  const __m256i quad = _mm256_set1_epi8(1);
  return peak<kSums, __m256i>(seconds, 64, [&](__m256i* sums) SLIDERQUANT_INLINE {
    unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE {
      __m256i bytes = quad;
      asm volatile("" : "+v"(bytes));  // each sum has products of its own
      sums[I] = _mm256_add_epi16(sums[I], _mm256_maddubs_epi16(bytes, quad));
    });
  });
}

}  // namespace sliderquant::cpu::avx2
