// The fastest of many bursts, for benchmarks.
#pragma once

#include <algorithm>
#include <chrono>

#include "blocking.h"

namespace sliderquant::cpu {

// Rounds per second: the best of bursts of so many rounds.
template <class Round>
SLIDERQUANT_INLINE inline double fastest(double seconds, int rounds, const Round& round) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (const auto end = Clock::now() + std::chrono::duration<double>(seconds); Clock::now() < end;) {
    const auto begin = Clock::now();
    for (int i = 0; i < rounds; ++i) round();
    best = std::max(best, rounds / std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

// Operations per second where step(sums) does so many instructions, each with a sum of its own, of so many operations.
template <int Sums, class Vector, class Step>
SLIDERQUANT_INLINE inline double peak(double seconds, int operations, const Step& step) {
  constexpr int kRounds = 10000;
  Vector sums[Sums] = {};
  // To the compiler they differ, or it would compute one of them alone; and all are wanted.
  unroll<Sums>([&]<int I>() SLIDERQUANT_INLINE { asm volatile("" : "+v"(sums[I])); });
  const double rounds = fastest(seconds, kRounds, [&]() SLIDERQUANT_INLINE { step(sums); });
  unroll<Sums>([&]<int I>() SLIDERQUANT_INLINE { asm volatile("" ::"v"(sums[I])); });
  return rounds * Sums * operations;
}

}  // namespace sliderquant::cpu
