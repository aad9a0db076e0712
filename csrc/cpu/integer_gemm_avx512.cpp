// Integer GEMM (W4A4 and every other pair of widths up to 8) for AVX512 (F, BW, DQ, VL) with VNNI and BF16.
//
// Index names: n output channel, panel 32 of them, t half of a panel (one register), m token, k input channel,
// q four neighbouring k, u independent accumulator chain.
//
// vpdpbusd multiplies four unsigned activation codes, broadcast, with four signed weight codes per 32-bit lane and adds
// them exactly.
//
// Few tokens: codes go from memory straight into the dot product. More tokens: a chunk of a panel is expanded once into
// L1-sized scratch and reused by all of them, and the activation codes are first packed block by block of tokens, since
// rows that lie a power of two apart would compete for one cache set.
#include <algorithm>
#include <utility>

#include "api.h"
#include "avx512.h"
#include "expand_quads.h"
#include "integer_epilogue.h"
#include "pack_tokens.h"

namespace sliderquant::cpu::avx512 {
namespace {

constexpr int kChunk = 1024;  // input channels per expansion: 32 * 1024 bytes, two thirds of a 48 KB L1
static_assert(kChunk % layout::kBlockCodes == 0, "a chunk must hold whole periods of every width");

constexpr int kQuadsPerTurn = 4;
static_assert(layout::kBlockCodes / 4 % kQuadsPerTurn == 0, "a chunk must be whole turns");

SLIDERQUANT_INLINE inline __m512i broadcast_quad(const uint8_t* codes) {
  int32_t quad;
  __builtin_memcpy(&quad, codes, sizeof quad);
  return _mm512_set1_epi32(quad);
}

// A panel for Tokens <= kDirectTokens tokens.
template <int Bits, int Tokens>
void direct_panel(const IntegerGemm& a, int64_t panel) {
  constexpr int kQuads = ExpandQuads<Bits>::kQuads;
  // One token alone would wait for the latency of each dot product.
  constexpr int kChains = Tokens == 1 ? std::min(4, kQuads) : std::min(2, kQuads);
  const ExpandQuads<Bits> expand;
  const int64_t n0 = panel * layout::kPanelRows;
  const uint32_t* w = chunk_words<Bits>(a.w, a.k, panel, 0);

  __m512i sum[Tokens][kTiles][kChains];
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<kChains>([&]<int U>() SLIDERQUANT_INLINE { sum[M][0][U] = sum[M][1][U] = _mm512_setzero_si512(); });
  });
  for (int64_t k = 0; k < a.k; k += layout::period_codes(Bits)) {
    expand(w, [&]<int Q>(const Halves& quads) SLIDERQUANT_INLINE {
      unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
        const __m512i codes = broadcast_quad(a.codes + M * a.k + k + 4 * Q);
        unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
          __m512i& into = sum[M][T][Q % kChains];
          into = _mm512_dpbusd_epi32(into, codes, quads[T]);
        });
      });
    });
    prefetch_period<Bits>(w);
    w += layout::period_words(Bits) * layout::kPanelRows;
  }
  unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
    const int64_t n = n0 + T * layout::kVectorRows;
    const Columns columns = load_columns(a, n);
    unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
      __m512i total = sum[M][T][0];
      unroll<kChains - 1>([&]<int U>() SLIDERQUANT_INLINE { total = _mm512_add_epi32(total, sum[M][T][U + 1]); });
      store_row(a, columns, M, n, total);
    });
  });
}

// sums[m, 32] += (expanded quads of a chunk, [quads, 32]) . codes, for Tokens tokens whose packed codes are
// [quads, Tokens].
template <int Tokens>
void block_chunk(const uint32_t* expanded, int64_t quads, const uint32_t* codes, int32_t* sums, Ahead& ahead) {
  __m512i sum[Tokens][kTiles];
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    sum[M][0] = _mm512_load_si512(sums + M * layout::kPanelRows);
    sum[M][1] = _mm512_load_si512(sums + M * layout::kPanelRows + layout::kVectorRows);
  });
  for (int64_t q = 0; q < quads; q += kQuadsPerTurn) {
    unroll<kQuadsPerTurn>([&]<int Q>() SLIDERQUANT_INLINE {
      const uint32_t* w = expanded + Q * layout::kPanelRows;
      const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + layout::kVectorRows);
      unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
        const __m512i quad = _mm512_set1_epi32(static_cast<int32_t>(codes[Q * Tokens + M]));
        sum[M][0] = _mm512_dpbusd_epi32(sum[M][0], quad, w0);
        sum[M][1] = _mm512_dpbusd_epi32(sum[M][1], quad, w1);
      });
    });
    ahead.prefetch();
    expanded += kQuadsPerTurn * layout::kPanelRows;
    codes += kQuadsPerTurn * Tokens;
  }
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    _mm512_store_si512(sums + M * layout::kPanelRows, sum[M][0]);
    _mm512_store_si512(sums + M * layout::kPanelRows + layout::kVectorRows, sum[M][1]);
  });
}

using BlockChunk = decltype(&block_chunk<1>);

template <int... Tokens>
BlockChunk block_chunk_of(int64_t tokens, std::integer_sequence<int, Tokens...>) {
  static constexpr BlockChunk table[] = {block_chunk<Tokens + 1>...};
  return table[tokens - 1];
}

// Up to kSharingPanels panels, for up to kSuperTokens tokens.
template <int Bits>
void block_panels(const IntegerGemm& a, const uint32_t* blocks, int64_t begin, int64_t end, uint32_t* expanded,
                  int32_t* sums) {
  const int64_t panel_sums = a.m * layout::kPanelRows;
  std::fill(sums, sums + (end - begin) * panel_sums, 0);
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0);
    for (int64_t panel = begin; panel < end; ++panel) {
      expand_quads<Bits>(chunk_words<Bits>(a.w, a.k, panel, k0), chunk, expanded);
      Ahead ahead = chunk_after<Bits>(a.w, a.k, begin, panel, end, k0, chunk);
      for (int64_t block = 0; block < TokenBlocks::count(a.m); ++block) {
        const int64_t m = TokenBlocks::begin(a.m, block), count = TokenBlocks::begin(a.m, block + 1) - m;
        block_chunk_of(count, std::make_integer_sequence<int, kBlockTokens>{})(
            expanded, chunk / 4, blocks + (k0 * a.m + m * chunk) / 4,
            sums + (panel - begin) * panel_sums + m * layout::kPanelRows, ahead);
      }
    }
  }
  store_panels(a, begin, end, panel_sums, sums);
}

template <int Bits>
void direct_panels(const IntegerGemm& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    switch (a.m) {
      case 1: direct_panel<Bits, 1>(a, panel); break;
      case 2: direct_panel<Bits, 2>(a, panel); break;
      case 3: direct_panel<Bits, 3>(a, panel); break;
      default: direct_panel<Bits, kDirectTokens>(a, panel);
    }
  }
}

template <int Bits>
void panels(const IntegerGemm& a, const uint32_t* blocks, int64_t begin, int64_t end) {
  if (a.m <= kDirectTokens) return direct_panels<Bits>(a, begin, end);
  thread_local Scratch scratch;
  constexpr int64_t kExpanded = kChunk / 4 * layout::kPanelRows;
  const int64_t sharing = std::min<int64_t>(kSharingPanels, end - begin);
  auto* expanded = scratch.get<uint32_t>(kExpanded + sharing * a.m * layout::kPanelRows);
  auto* sums = reinterpret_cast<int32_t*>(expanded + kExpanded);
  for (; begin < end; begin += sharing) {
    block_panels<Bits>(a, blocks, begin, std::min(begin + sharing, end), expanded, sums);
  }
}

// Packs the codes of the tokens [begin, end), which are a block, into
// [chunks of k][blocks of tokens][quad of k][token].
void pack_block(const IntegerGemm& a, int64_t begin, int64_t end, uint32_t* blocks) {
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0), count = end - begin;
    pack_tokens(a.codes + begin * a.k + k0, a.k, count, chunk / 4, count, blocks + (k0 * a.m + begin * chunk) / 4);
  }
}

// The panels given, for up to kSuperTokens tokens.
void super_block(const IntegerGemm& a, Panels of, Parallel parallel) {
  thread_local Scratch pack;
  uint32_t* blocks = nullptr;
  if (a.m > kDirectTokens) {
    blocks = pack.get<uint32_t>(a.m * a.k / 4);
    parallel_for(parallel, TokenBlocks::count(a.m), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        pack_block(a, TokenBlocks::begin(a.m, block), TokenBlocks::begin(a.m, block + 1), blocks);
      }
    });
  }
  const auto run = layout::with_bits(a.bits, [](auto bits) { return panels<bits>; });
  parallel_for(parallel, of.end - of.begin, panel_grain(a.m, a.k),
               [&](int64_t begin, int64_t end) { run(a, blocks, of.begin + begin, of.begin + end); });
}

}  // namespace

void integer_gemm(const IntegerGemm& a, Panels of, Parallel parallel) {
  for_super_tokens(a, [&](const IntegerGemm& part) { super_block(part, of, parallel); });
}

}  // namespace sliderquant::cpu::avx512
