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

}  // namespace sliderquant::cpu
