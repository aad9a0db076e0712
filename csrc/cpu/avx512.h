// What the AVX512 kernels share. Included by files compiled for AVX512 only.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "../layout.h"

#define SLIDERQUANT_INLINE __attribute__((always_inline))

namespace sliderquant::cpu::avx512 {

constexpr int kTiles = layout::kPanelRows / layout::kVectorRows;  // registers per panel
static_assert(kTiles == 2, "the register blocking counts on two registers per panel");

constexpr int kDirectTokens = 4;  // up to here expanding weights into scratch costs more than it saves
constexpr int kBlockTokens = 12;  // 12 * 2 accumulators + 2 weights + 1 broadcast of the 32 registers
static_assert(kBlockTokens * kTiles + kTiles + 1 <= 32, "a block of tokens must fit the register file");

// Tokens that share one expansion of the weights; their sums of one panel take 32 KB.
constexpr int kSuperTokens = 256;

// Ahead of the stream of weights: hardware prefetchers stop at each 4 KB page.
constexpr int kPrefetchBytes = 2048;

// f.operator()<0>(), f.operator()<1>(), ... Loops over arrays of registers must be unrolled like this: unrolled by the
// optimizer, they come too late for it to keep the array out of memory.
template <int Count, class F>
SLIDERQUANT_INLINE inline void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) SLIDERQUANT_INLINE {
    (f.template operator()<I>(), ...);
  }(std::make_integer_sequence<int, Count>{});
}

// Prefetches the weights of one period of a panel, kPrefetchBytes further on; into the next panel at the end of one.
template <int Bits>
SLIDERQUANT_INLINE inline void prefetch_period(const uint32_t* w) {
  unroll<layout::period_words(Bits) * kTiles>([&]<int D>() SLIDERQUANT_INLINE {
    _mm_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes + 64 * D, _MM_HINT_T0);
  });
}

// Lanes of the 16 channels from n on that exist.
inline __mmask16 tail_mask(int64_t n, int64_t count) {
  const int64_t left = count - n;
  return static_cast<__mmask16>(left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1 << left) - 1);
}

// Panels that are worth a thread: waking one costs microseconds.
inline int64_t panel_grain(int64_t tokens, int64_t in_features) {
  constexpr int64_t kGrainProducts = 1 << 19;
  return 1 + kGrainProducts / (layout::kPanelRows * tokens * in_features);
}

// Blocks of tokens are nearly equal: 16 tokens run as 8 + 8, not as 12 + 4.
inline int64_t block_count(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }
inline int64_t block_begin(int64_t tokens, int64_t block) { return tokens * block / block_count(tokens); }

}  // namespace sliderquant::cpu::avx512
