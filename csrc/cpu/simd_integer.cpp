// Integer GEMM (W4A4 and every other pair of widths up to 8), for every instruction set without a file of its own.
//
// Index names: n output channel, panel 32 of them, v one register of a tile, m token, k input channel, q four
// neighbouring k.
//
// A 32-bit lane has codes of four neighbouring k. Weights of up to 4 bits are multiplied as these bytes, with sums of 16
// bits that are widened before they can overflow. 8-bit ones, and all where there are no products of bytes, are split
// into those of even and of odd k: each is a pair of 16-bit integers, which one instruction multiplies with a pair of
// activation codes and adds up. Both are exact.
#include <type_traits>

#include "../formula.h"
#include "api.h"
#include "simd.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

using layout::kPanelRows;

constexpr int kChunk = 256;  // input channels per expansion: 32 * 256 * 2 bytes at most
static_assert(kChunk % layout::kBlockCodes == 0, "a chunk must hold whole periods of every width");

// Words that hold four k of a channel or of a token: their bytes, or two pairs.
template <bool kBytes>
constexpr int kQuadWords = kBytes ? 1 : 2;

// Quads whose products of bytes a 16-bit sum can hold, a power of two: where codes of weights have so many bits, and
// none of x is larger than `largest`.
int64_t quads_per_sum(int bits, uint32_t largest) {
  const int64_t products = 2 * ((1 << bits) - 1) * std::max<int64_t>(largest, 1);
  int64_t quads = kChunk / 4;
  while (quads * products > INT16_MAX) quads /= 2;
  return quads;
}
static_assert(2 * 2 * 15 * 255 <= INT16_MAX && 8 * 2 * 7 * 255 <= INT16_MAX && 4 * 2 * 3 * 255 <= INT16_MAX,
              "a sum must hold a period of codes");

// Calls emit.template operator()<i>(words) for the words that the quads of a period become, of some registers' channels.
template <int Bits, bool kBytes, int Vectors, class Emit>
SLIDERQUANT_INLINE inline void expand(const uint32_t* w, Emit&& emit) {
  Words words[Vectors][layout::period_words(Bits)];
  load_period<Bits, Vectors>(w, words);
  unroll<layout::period_codes(Bits) / 4>([&]<int Q>() SLIDERQUANT_INLINE {
    unroll<kQuadWords<kBytes>>([&]<int I>() SLIDERQUANT_INLINE {
      constexpr uint32_t kRepeat = kBytes ? 0x01010101 : 0x00010001;
      Words codes[Vectors];
      unroll<Vectors>([&]<int V>() SLIDERQUANT_INLINE {
        codes[V] = codes_at<layout::Family::kQuads, Bits, 4 * Q, kRepeat, 8 * I, true>(words[V]);
      });
      emit.template operator()<Q * kQuadWords<kBytes> + I>(codes);
    });
  });
}

// Expands a chunk of a panel to [quads of k][kQuadWords][kPanelRows].
template <int Bits, bool kBytes>
void expand_chunk(const uint32_t* w, int64_t chunk, uint32_t* expanded) {
  for (int64_t k = 0; k < chunk; k += layout::period_codes(Bits)) {
    for (int at = 0; at < kPanelRows; at += kLanes) {
      expand<Bits, kBytes, 1>(w + at, [&]<int I>(const Words* codes) SLIDERQUANT_INLINE {
        store(expanded + I * kPanelRows + at, codes[0]);
      });
    }
    prefetch_period<Bits>(w);
    w += layout::period_words(Bits) * kPanelRows;
    expanded += layout::period_codes(Bits) / 4 * kQuadWords<kBytes> * kPanelRows;
  }
}

// Of the products of words in registers: two of 16 bits in a lane, or one of 32.
template <bool kBytes>
using Sums = std::conditional_t<kBytes, Pairs, Words>;

SLIDERQUANT_INLINE inline Words widen(Pairs sums) { return add_halves(sums); }
SLIDERQUANT_INLINE inline Words widen(Words sums) { return sums; }

// Adds the sums of a tile to those in memory.
template <class Sum, int Tokens, int Vectors>
SLIDERQUANT_INLINE inline void add_to(const Sum (&sum)[Tokens][Vectors], uint32_t* sums) {
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<Vectors>([&]<int V>() SLIDERQUANT_INLINE {
      uint32_t* into = sums + M * kPanelRows + V * kLanes;
      store(into, load<Words>(into) + widen(sum[M][V]));
    });
  });
}

// sums[m, kTileRows] += (expanded [words, kPanelRows]) . codes [words, Tokens]; sums of 16 bits hold so many words.
template <int Tokens, bool kBytes>
void block_chunk(const uint32_t* expanded, int64_t words, int64_t per_sum, const uint32_t* codes, uint32_t* sums) {
  while (words > 0) {
    Sums<kBytes> sum[Tokens][kVectors];
    clear(sum);
    int64_t left = std::min(per_sum, words);
    words -= left;
    do {  // a loop that may run 0 times takes more registers than there are
      Words w[kVectors];
      unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE { w[V] = load<Words>(expanded + V * kLanes); });
      unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
        const Words x = splat(codes[M]);
        unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE {
          if constexpr (kBytes) {
            sum[M][V] += multiply_bytes(x, w[V]);
          } else {
            sum[M][V] += multiply_pairs(x, w[V]);
          }
        });
      });
      expanded += kPanelRows;
      codes += Tokens;
    } while (--left > 0);
    add_to(sum, sums);
  }
}

using BlockChunk = decltype(&block_chunk<1, false>);

template <bool kBytes, int... Tokens>
BlockChunk block_chunk_of(int64_t tokens, std::integer_sequence<int, Tokens...>) {
  static constexpr BlockChunk table[] = {block_chunk<Tokens + 1, kBytes>...};
  return table[tokens - 1];
}

// Codes of x: [chunks of k][blocks of tokens][quads of k][kQuadWords][token].
struct Activations {
  const uint32_t* blocks;
  int64_t per_sum;  // words that a sum of 16 bits holds
};

template <bool kBytes>
void block_panel(const IntegerGemm& a, const Activations& x, int64_t panel, uint32_t* expanded, uint32_t* sums) {
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0), words = chunk / 4 * kQuadWords<kBytes>;
    const int64_t period = k0 / layout::period_codes(a.bits);
    const uint32_t* w = a.w + layout::word_index(a.bits, a.k, panel * kPanelRows, period, 0);
    layout::with_bits(a.bits, [&](auto bits) { expand_chunk<bits, kBytes>(w, chunk, expanded); });
    for (int64_t block = 0; block < TokenBlocks::count(a.m); ++block) {
      const int64_t m = TokenBlocks::begin(a.m, block), count = TokenBlocks::begin(a.m, block + 1) - m;
      const BlockChunk run = block_chunk_of<kBytes>(count, std::make_integer_sequence<int, kTileTokens>{});
      const uint32_t* codes = x.blocks + (k0 * a.m + m * chunk) / 4 * kQuadWords<kBytes>;
      for (int64_t tile = 0; tile < kPanelRows; tile += kTileRows) {
        run(expanded + tile, words, x.per_sum, codes, sums + m * kPanelRows + tile);
      }
    }
  }
}

// Few tokens: weights go from memory straight into the products.
template <int Bits, int Tokens>
void direct_panel(const IntegerGemm& a, const Activations& x, int64_t panel, uint32_t* sums) {
  constexpr int kQuads = layout::period_codes(Bits) / 4, kWide = kDirectVectors<Bits, Tokens>;
  for (int64_t tile = 0; tile < kPanelRows; tile += kWide * kLanes) {
    const uint32_t* w = a.w + layout::word_index(Bits, a.k, panel * kPanelRows, 0, 0) + tile;
    const uint32_t* codes = x.blocks;
    for (int64_t quads = a.k / 4; quads > 0;) {
      Pairs sum[Tokens][kWide];
      clear(sum);
      int64_t left = std::min(x.per_sum, quads);
      quads -= left;
      do {
        expand<Bits, true, kWide>(w, [&]<int Q>(const Words* quads) SLIDERQUANT_INLINE {
          unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
            const Words x_quad = splat(codes[Q * Tokens + M]);
            unroll<kWide>([&]<int V>() SLIDERQUANT_INLINE { add_now(sum[M][V], multiply_bytes(x_quad, quads[V])); });
          });
        });
        prefetch_period<Bits>(w);
        w += layout::period_words(Bits) * kPanelRows;
        codes += kQuads * Tokens;
      } while ((left -= kQuads) > 0);
      add_to(sum, sums + tile);
    }
  }
}

constexpr int kDirectTokens = 5;  // up to here expanding weights into scratch costs more than it saves

template <int Bits, int... Tokens>
auto direct_panel_of(int64_t tokens, std::integer_sequence<int, Tokens...>) {
  static constexpr decltype(&direct_panel<Bits, 1>) table[] = {direct_panel<Bits, Tokens + 1>...};
  return table[tokens - 1];
}

// Returns the largest code.
template <bool kBytes>
uint32_t pack_block(const IntegerGemm& a, int64_t begin, int64_t end, uint32_t* blocks) {
  uint8_t largest = 0;
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0), count = end - begin;
    uint32_t* packed = blocks + (k0 * a.m + begin * chunk) / 4 * kQuadWords<kBytes>;
    for (int64_t m = begin; m < end; ++m) {
      const uint8_t* codes = a.codes + m * a.k + k0;
      for (int64_t k = 0; k < chunk; ++k) largest = std::max(largest, codes[k]);
      for (int64_t q = 0; q < chunk / 4; ++q) {
        if constexpr (kBytes) {
          memcpy(packed + q * count + m - begin, codes + 4 * q, 4);
        } else {
          for (int odd = 0; odd < 2; ++odd) {
            const uint32_t pair = codes[4 * q + odd] | static_cast<uint32_t>(codes[4 * q + 2 + odd]) << 16;
            packed[(2 * q + odd) * count + m - begin] = pair;
          }
        }
      }
    }
  }
  return largest;
}

// From sums [m, kPanelRows] to the outputs of a register's channels: integer_output, lane by lane.
void store_channels(const IntegerGemm& a, int64_t n, const uint32_t* sums) {
  if (n + kLanes > a.n) {
    for (int64_t m = 0; m < a.m; ++m) {
      for (int64_t r = 0; n + r < a.n; ++r) {
        store_float(a.y, a.y_type, m * a.n + n + r, integer_output(a, m, n + r, sums[m * kPanelRows + r]));
      }
    }
    return;
  }
  const Words column = load<Words>(a.col_sum + n);
  const Words zero = a.zw != nullptr ? reinterpret_cast<Words>(load_bytes(a.zw + n)) : splat(1u << (a.bits - 1));
  const Floats scale = load<Floats>(a.sw + n);
  for (int64_t m = 0; m < a.m; ++m) {
    const auto token_zero = static_cast<uint32_t>(a.za[m]), token_sum = static_cast<uint32_t>(a.row_sum[m]);
    const uint32_t per_zero = static_cast<uint32_t>(a.k) * token_zero - token_sum;
    const Words bracket = load<Words>(sums + m * kPanelRows) - column * token_zero + zero * per_zero;
    const Floats y = __builtin_convertvector(reinterpret_cast<Ints>(bracket), Floats) * (scale * splat(a.sa[m]));
    store_floats(a.y, a.y_type, m * a.n + n, a.bias != nullptr ? y + load<Floats>(a.bias + n) : y);
  }
}

// The panels given, for up to kSuperTokens tokens.
template <bool kBytes>
void super_block(const IntegerGemm& a, Panels of, Parallel parallel) {
  thread_local Scratch pack;
  const int64_t count = TokenBlocks::count(a.m);
  auto* largest = pack.get<uint32_t>(count + a.m * a.k / 4 * kQuadWords<kBytes>);
  uint32_t* blocks = largest + count;
  parallel_for(parallel, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t m = TokenBlocks::begin(a.m, block);
      largest[block] = pack_block<kBytes>(a, m, TokenBlocks::begin(a.m, block + 1), blocks);
    }
  });
  const Activations x = {blocks, kBytes ? quads_per_sum(a.bits, *std::max_element(largest, largest + count)) : kChunk};
  parallel_for(parallel, of.end - of.begin, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto* expanded = scratch.get<uint32_t>((kChunk / 2 + a.m) * kPanelRows);
    uint32_t* sums = expanded + kChunk / 2 * kPanelRows;
    for (int64_t panel = of.begin + begin; panel < of.begin + end; ++panel) {
      std::fill(sums, sums + a.m * kPanelRows, 0);
      if (kBytes && a.m <= kDirectTokens) {
        layout::with_bits(a.bits, [&](auto bits) {
          direct_panel_of<bits>(a.m, std::make_integer_sequence<int, kDirectTokens>{})(a, x, panel, sums);
        });
      } else {
        block_panel<kBytes>(a, x, panel, expanded, sums);
      }
      for (int64_t at = 0; at < kPanelRows; at += kLanes) store_channels(a, panel * kPanelRows + at, sums + at);
    }
  });
}

}  // namespace

void integer_gemm(const IntegerGemm& a, Panels of, Parallel parallel) {
  const auto run = kMultipliesBytes && a.bits <= 4 ? super_block<true> : super_block<false>;
  for_super_tokens(a, [&](const IntegerGemm& part) { run(part, of, parallel); });
}

}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
