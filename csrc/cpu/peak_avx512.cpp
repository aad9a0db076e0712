// How fast one thread multiplies out of registers, for benchmarks: the roof over every kernel here.
#include <chrono>

#include "avx512.h"
#include "peak.h"

namespace sliderquant::cpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSums = 24;  // as many as the kernels have
constexpr int kRounds = 10000;

// Operations per second while step(sums) does kSums instructions of so many operations each; the best of many bursts.
template <class Vector, class Step>
SLIDERQUANT_INLINE inline double fastest(double seconds, int operations, Step&& step) {
  Vector sums[kSums] = {};
  // To the compiler they differ, or it would compute one of them alone; and all are wanted.
  unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE { asm volatile("" : "+v"(sums[I])); });
  double best = 0;
  for (const auto end = Clock::now() + std::chrono::duration<double>(seconds); Clock::now() < end;) {
    const auto begin = Clock::now();
    for (int round = 0; round < kRounds; ++round) step(sums);
    const double taken = std::chrono::duration<double>(Clock::now() - begin).count();
    best = best > kRounds * kSums / taken ? best : kRounds * kSums / taken;
  }
  unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE { asm volatile("" ::"v"(sums[I])); });
  return best * operations;
}

}  // namespace

double peak_bf16(double seconds) {
  const __m512i pair = _mm512_set1_epi32(0x3F803F80);
  return fastest<__m512>(seconds, 64, [&](__m512* sums) SLIDERQUANT_INLINE {
    asm volatile("" ::"v"(pair));
    unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE {
      sums[I] = _mm512_dpbf16_ps(sums[I], reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(pair));
    });
  });
}

double peak_int8(double seconds) {
  const __m512i quad = _mm512_set1_epi8(1);
  return fastest<__m512i>(seconds, 128, [&](__m512i* sums) SLIDERQUANT_INLINE {
    asm volatile("" ::"v"(quad));
    unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE { sums[I] = _mm512_dpbusd_epi32(sums[I], quad, quad); });
  });
}

}  // namespace sliderquant::cpu
