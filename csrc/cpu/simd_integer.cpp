// Integer GEMM (W4A4 and every other pair of widths up to 8), for every instruction set without a file of its own.
//
// Index names: n output channel, panel 32 of them, v one register of a tile, m token, k input channel, q four
// neighbouring k.
//
// A 32-bit lane has codes of four neighbouring k. Split into those of even and of odd k, each is a pair of 16-bit
// integers, which one instruction multiplies with a pair of activation codes and adds up, exactly.
#include "../formula.h"
#include "api.h"
#include "simd.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

using layout::kPanelRows;

constexpr int kChunk = 256;  // input channels per expansion: 32 * 256 * 2 bytes
static_assert(kChunk % layout::kBlockCodes == 0, "a chunk must hold whole periods of every width");

// In each lane the sum of the products of two pairs of 16-bit integers from 0 to 255.
SLIDERQUANT_INLINE inline Words multiply_pairs(Words a, Words b) {
#if defined(SLIDERQUANT_X86) && SLIDERQUANT_LANES == 16
  return reinterpret_cast<Words>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(SLIDERQUANT_X86) && SLIDERQUANT_LANES == 8
  return reinterpret_cast<Words>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(SLIDERQUANT_X86)
  return reinterpret_cast<Words>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFF) * (b & 0xFFFF) + (a >> 16) * (b >> 16);
#endif
}

// Expands a chunk of a panel to [quads of k][even, odd][kPanelRows].
template <int Bits>
void expand_chunk(const uint32_t* w, int64_t chunk, uint32_t* expanded) {
  constexpr int kQuads = layout::period_codes(Bits) / 4, kWords = layout::period_words(Bits);
  for (int64_t k = 0; k < chunk; k += 4 * kQuads) {
    for (int at = 0; at < kPanelRows; at += kLanes) {
      Words words[kWords];
      unroll<kWords>([&]<int D>() SLIDERQUANT_INLINE {
        words[D] = load<Words>(w + D * kPanelRows + at);
        __builtin_prefetch(reinterpret_cast<const char*>(w + D * kPanelRows + at) + kPrefetchBytes);
      });
      unroll<kQuads>([&]<int Q>() SLIDERQUANT_INLINE {
        uint32_t* to = expanded + 2 * Q * kPanelRows + at;
        store(to, codes_at<layout::Family::kQuads, Bits, 4 * Q, 0x00010001, 0, true>(words));
        store(to + kPanelRows, codes_at<layout::Family::kQuads, Bits, 4 * Q, 0x00010001, 8, true>(words));
      });
    }
    w += kWords * kPanelRows;
    expanded += 2 * kQuads * kPanelRows;
  }
}

// sums[m, kTileRows] += (expanded [pairs, kPanelRows]) . codes [pairs, Tokens]
template <int Tokens>
void block_chunk(const uint32_t* expanded, int64_t pairs, const uint32_t* codes, uint32_t* sums) {
  Words sum[Tokens][kVectors];
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE { sum[M][V] = load<Words>(sums + M * kPanelRows + V * kLanes); });
  });
  for (int64_t pair = 0; pair < pairs; ++pair) {
    unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
      const Words x = splat(codes[M]);
      unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE {
        sum[M][V] += multiply_pairs(load<Words>(expanded + V * kLanes), x);
      });
    });
    expanded += kPanelRows;
    codes += Tokens;
  }
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE { store(sums + M * kPanelRows + V * kLanes, sum[M][V]); });
  });
}

using BlockChunk = decltype(&block_chunk<1>);

template <int... Tokens>
BlockChunk block_chunk_of(int64_t tokens, std::integer_sequence<int, Tokens...>) {
  static constexpr BlockChunk table[] = {block_chunk<Tokens + 1>...};
  return table[tokens - 1];
}

// blocks: [chunks of k][blocks of tokens][quads of k][even, odd][token]
void panel_sums(const IntegerGemm& a, const uint32_t* blocks, int64_t panel, uint32_t* expanded, uint32_t* sums) {
  std::fill(sums, sums + a.m * kPanelRows, 0);
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0);
    const int64_t period = k0 / layout::period_codes(a.bits);
    const uint32_t* w = a.w + layout::word_index(a.bits, a.k, panel * kPanelRows, period, 0);
    layout::with_bits(a.bits, [&](auto bits) { expand_chunk<bits>(w, chunk, expanded); });
    for (int64_t block = 0; block < TokenBlocks::count(a.m); ++block) {
      const int64_t m = TokenBlocks::begin(a.m, block), count = TokenBlocks::begin(a.m, block + 1) - m;
      const BlockChunk run = block_chunk_of(count, std::make_integer_sequence<int, kTileTokens>{});
      for (int64_t tile = 0; tile < kPanelRows; tile += kTileRows) {
        run(expanded + tile, chunk / 2, blocks + (k0 * a.m + m * chunk) / 2, sums + m * kPanelRows + tile);
      }
    }
  }
}

void pack_block(const IntegerGemm& a, int64_t begin, int64_t end, uint32_t* blocks) {
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0), count = end - begin;
    uint32_t* packed = blocks + (k0 * a.m + begin * chunk) / 2;
    for (int64_t m = begin; m < end; ++m) {
      const uint8_t* codes = a.codes + m * a.k + k0;
      for (int64_t q = 0; q < chunk / 4; ++q) {
        for (int odd = 0; odd < 2; ++odd) {
          const uint32_t pair = codes[4 * q + odd] | static_cast<uint32_t>(codes[4 * q + 2 + odd]) << 16;
          packed[(2 * q + odd) * count + m - begin] = pair;
        }
      }
    }
  }
}

// The panels given, for up to kSuperTokens tokens.
void super_block(const IntegerGemm& a, Panels of, Parallel parallel) {
  thread_local Scratch pack;
  auto* blocks = pack.get<uint32_t>(a.m * a.k / 2);
  parallel_for(parallel, TokenBlocks::count(a.m), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      pack_block(a, TokenBlocks::begin(a.m, block), TokenBlocks::begin(a.m, block + 1), blocks);
    }
  });
  parallel_for(parallel, of.end - of.begin, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto* expanded = scratch.get<uint32_t>((kChunk / 2 + a.m) * kPanelRows);
    uint32_t* sums = expanded + kChunk / 2 * kPanelRows;
    for (int64_t panel = of.begin + begin; panel < of.begin + end; ++panel) {
      panel_sums(a, blocks, panel, expanded, sums);
      const int64_t n0 = panel * kPanelRows, rows = std::min<int64_t>(kPanelRows, a.n - n0);
      for (int64_t m = 0; m < a.m; ++m) {
        for (int64_t r = 0; r < rows; ++r) {
          store_float(a.y, a.y_type, m * a.n + n0 + r, integer_output(a, m, n0 + r, sums[m * kPanelRows + r]));
        }
      }
    }
  });
}

}  // namespace

void integer_gemm(const IntegerGemm& a, Panels of, Parallel parallel) {
  for_super_tokens(a, [&](const IntegerGemm& part) { super_block(part, of, parallel); });
}

}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
