// How the CPU kernels cut their work, the same for every instruction set. All of it is inlined: of a function that
// files with different flags emit, only one copy would be kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../args.h"
#include "../experts.h"
#include "../layout.h"

#define SLIDERQUANT_INLINE __attribute__((always_inline))

namespace sliderquant::cpu {

// Tokens that share one expansion of the weights; their sums of one panel take 32 KB.
constexpr int kSuperTokens = 256;

// Ahead of the stream of weights: hardware prefetchers stop at each 4 KB page, and one core keeps a memory of 40 GB/s
// and 100 ns busy only with more than 4 KB under way. Measured best from 12 KB on.
constexpr int kPrefetchBytes = 16384;

// Scales and zero points of one panel are a whole row of N apart from group to group: those of a group so many further,
// or of the next panel where there is none.
SLIDERQUANT_INLINE inline void prefetch_scale(const Wna16& a, int64_t g, int64_t n) {
  constexpr int64_t kAhead = 8;
  const int64_t groups = a.k / a.group;
  g += kAhead;
  if (g >= groups) {
    n += layout::kPanelRows;
    g = std::min(g - groups, groups - 1);
  }
  if (n >= a.n) return;
  const int64_t at = g * a.n + n;
  __builtin_prefetch(a.scale + at);
  if (a.n - n > layout::kVectorRows) __builtin_prefetch(a.scale + at + layout::kVectorRows);
  if (a.zero != nullptr) __builtin_prefetch(a.zero + at);
}

// f.operator()<0>(), f.operator()<1>(), ... Loops over arrays of registers must be unrolled like this: unrolled by the
// optimizer, they come too late for it to keep the array out of memory.
template <int Count, class F>
SLIDERQUANT_INLINE inline void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) SLIDERQUANT_INLINE {
    (f.template operator()<I>(), ...);
  }(std::make_integer_sequence<int, Count>{});
}

// Tokens in blocks of at most so many, nearly equal ones: 16 tokens run as 8 + 8, not as 12 + 4.
template <int Most>
struct Blocks {
  SLIDERQUANT_INLINE static int64_t count(int64_t tokens) { return (tokens + Most - 1) / Most; }
  SLIDERQUANT_INLINE static int64_t begin(int64_t tokens, int64_t block) { return tokens * block / count(tokens); }
};

// run(part) for the tokens of a product, up to kSuperTokens at a time.
template <class Gemm, class Run>
SLIDERQUANT_INLINE inline void for_super_tokens(const Gemm& a, Run&& run) {
  for (int64_t m = 0; m < a.m; m += kSuperTokens) run(of_tokens(a, m, std::min<int64_t>(kSuperTokens, a.m - m)));
}

}  // namespace sliderquant::cpu
