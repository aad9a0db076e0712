// What the AVX512 kernels share. Included by files compiled for AVX512 only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../layout.h"
#include "blocking.h"

namespace sliderquant::cpu::avx512 {

constexpr int kTiles = layout::kPanelRows / layout::kVectorRows;  // registers per panel
static_assert(kTiles == 2, "the register blocking counts on two registers per panel");

// A vector of each half of a panel. Codes of both halves are expanded at once: what meets them, broadcast from the
// activations, is then needed once and briefly. Halves one after the other make the compiler keep it for the second one,
// and spill.
using Halves = __m512i[kTiles];

SLIDERQUANT_INLINE inline __m512i load_half(const uint32_t* words, int t) {
  return _mm512_loadu_si512(words + t * layout::kVectorRows);
}

constexpr int kDirectTokens = 4;  // up to here expanding weights into scratch costs more than it saves
constexpr int kBlockTokens = 12;  // 12 * 2 accumulators + 2 weights + 1 broadcast of the 32 registers
static_assert(kBlockTokens * kTiles + kTiles + 1 <= 32, "a block of tokens must fit the register file");
using TokenBlocks = Blocks<kBlockTokens>;

// Panels that meet a chunk of the activations while that is in L2, beside their sums.
constexpr int kSharingPanels = 8;

// Prefetches the weights of one period of a panel, so many bytes further on; into the next panel at the end of one.
template <int Bits, int Bytes = kPrefetchBytes, _mm_hint Hint = _MM_HINT_T0>
SLIDERQUANT_INLINE inline void prefetch_period(const uint32_t* w) {
  unroll<layout::period_words(Bits) * kTiles>([&]<int D>() SLIDERQUANT_INLINE {
    _mm_prefetch(reinterpret_cast<const char*>(w) + Bytes + 64 * D, Hint);
  });
}

// Words that will be expanded next, fetched while the present ones are multiplied.
struct Ahead {
  const uint32_t *words, *end;
  SLIDERQUANT_INLINE void prefetch() {
    if (words >= end) return;
    unroll<4>([&]<int I>() SLIDERQUANT_INLINE { _mm_prefetch(words + 16 * I, _MM_HINT_T1); });
    words += 64;
  }
};

// The words of a panel from input channel k on, which begins a period.
template <int Bits>
const uint32_t* chunk_words(const uint32_t* w, int64_t in_features, int64_t panel, int64_t k) {
  return w + layout::word_index(Bits, in_features, panel * layout::kPanelRows, k / layout::period_codes(Bits), 0);
}

// What comes after a chunk where the panels [begin, end) take turns: the same chunk of the next panel, the next chunk
// of the first panel, or the first chunk of the panel behind them.
template <int Bits>
Ahead chunk_after(const uint32_t* w, int64_t in_features, int64_t begin, int64_t panel, int64_t end, int64_t k,
                  int64_t chunk) {
  if (++panel == end) {
    k += chunk;
    panel = begin;
  }
  if (k == in_features) {
    k = 0;
    panel = end;
  }
  const uint32_t* words = chunk_words<Bits>(w, in_features, panel, k);
  return {words, words + layout::row_words(Bits, chunk) * layout::kPanelRows};
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

}  // namespace sliderquant::cpu::avx512
