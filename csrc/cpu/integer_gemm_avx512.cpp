// Integer GEMM (W4A4 and every other pair of widths up to 8) for AVX512 (F, BW, DQ, VL) with VNNI and BF16.
//
// Index names: n output channel, panel 32 of them, t half of a panel (one register), m token, k input channel,
// q four neighbouring k, u independent accumulator chain.
//
// vpdpbusd multiplies four unsigned activation codes, broadcast, with four signed weight codes per 32-bit lane and adds
// them exactly. Weight codes up to 4 bits are their own signed bytes; 8-bit ones are shifted by 128, which the epilogue
// gives back through row_sum. All integer corrections are made modulo 2^32: the caller guarantees that the final
// bracket fits 32 bits, so intermediate wraps cancel.
//
// Few tokens: codes go from memory straight into the dot product. More tokens: a chunk of a panel is expanded once into
// L1-sized scratch and reused by all of them, and the activation codes are first packed block by block of tokens, since
// rows that lie a power of two apart would compete for one cache set.
#include <algorithm>
#include <utility>

#include "api.h"
#include "avx512.h"
#include "pack_tokens.h"

namespace sliderquant::cpu::avx512 {
namespace {

constexpr int kChunk = 1024;  // input channels per expansion: 32 * 1024 bytes, two thirds of a 48 KB L1
static_assert(kChunk % layout::kBlockCodes == 0, "a chunk must hold whole periods of every width");

constexpr int kQuadsPerTurn = 4;
static_assert(layout::kBlockCodes / 4 % kQuadsPerTurn == 0, "a chunk must be whole turns");

// Calls emit.template operator()<q>(quad) for each four k of one period of one register's 16 channels; words are the
// period's words of the first of them.
template <int Bits>
struct Expand {
  static_assert(Bits == 2 || Bits == 4, "3 and 8 bits have layouts of their own");
  static constexpr int kQuads = 8 / Bits;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    const __m512i v = _mm512_loadu_si512(words);
    const __m512i mask = _mm512_set1_epi8((1 << Bits) - 1);
    unroll<kQuads>([&]<int Q>() SLIDERQUANT_INLINE {
      emit.template operator()<Q>(_mm512_and_si512(_mm512_srli_epi16(v, Bits * Q), mask));
    });
  }
};

template <>
struct Expand<3> {
  static constexpr int kQuads = 8;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    const __m512i low[2] = {_mm512_loadu_si512(words), _mm512_loadu_si512(words + layout::kPanelRows)};
    const __m512i high = _mm512_loadu_si512(words + 2 * layout::kPanelRows);
    const __m512i two_bits = _mm512_set1_epi8(3);
    const __m512i high_bit = _mm512_set1_epi8(4);
    unroll<kQuads>([&]<int Q>() SLIDERQUANT_INLINE {
      const __m512i l = _mm512_and_si512(_mm512_srli_epi16(low[Q / 4], 2 * (Q % 4)), two_bits);
      const __m512i h = Q < 2 ? _mm512_slli_epi16(high, (10 - Q) % 8) : _mm512_srli_epi16(high, (6 + Q) % 8);
      emit.template operator()<Q>(_mm512_ternarylogic_epi32(h, high_bit, l, 0xEA));  // (h & high_bit) | l
    });
  }
};

template <>
struct Expand<8> {
  static constexpr int kQuads = 1;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    emit.template operator()<0>(
        _mm512_xor_si512(_mm512_loadu_si512(words), _mm512_set1_epi8(static_cast<char>(0x80))));
  }
};

SLIDERQUANT_INLINE inline __m512i broadcast_quad(const uint8_t* codes) {
  int32_t quad;
  __builtin_memcpy(&quad, codes, sizeof quad);
  return _mm512_set1_epi32(quad);
}

// What the epilogue needs of 16 channels, loaded once per panel.
struct Columns {
  __mmask16 mask;
  __m512i col_sum, zero;
  __m512 scale, bias;
};

Columns load_columns(const IntegerGemm& a, int64_t n) {
  Columns c;
  c.mask = tail_mask(n, a.n);
  c.col_sum = _mm512_maskz_loadu_epi32(c.mask, a.col_sum + n);
  c.zero = a.zw != nullptr ? _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(c.mask, a.zw + n))
                           : _mm512_set1_epi32(1 << (a.bits - 1));
  c.scale = _mm512_maskz_loadu_ps(c.mask, a.sw + n);
  c.bias = a.bias != nullptr ? _mm512_maskz_loadu_ps(c.mask, a.bias + n) : _mm512_setzero_ps();
  return c;
}

void store_row(const IntegerGemm& a, const Columns& c, int64_t m, int64_t n, __m512i sum) {
  // bracket = sum - za * col_sum + zw * (k * za - row_sum) [+ 128 * row_sum for the shifted 8-bit codes]
  const uint32_t za = static_cast<uint32_t>(a.za[m]);
  const uint32_t row_sum = static_cast<uint32_t>(a.row_sum[m]);
  const uint32_t per_zero = static_cast<uint32_t>(a.k) * za - row_sum;
  const uint32_t shifted = a.bits == 8 ? 128 * row_sum : 0;
  __m512i bracket = _mm512_add_epi32(sum, _mm512_set1_epi32(static_cast<int32_t>(shifted)));
  bracket = _mm512_sub_epi32(bracket, _mm512_mullo_epi32(c.col_sum, _mm512_set1_epi32(static_cast<int32_t>(za))));
  bracket = _mm512_add_epi32(bracket, _mm512_mullo_epi32(c.zero, _mm512_set1_epi32(static_cast<int32_t>(per_zero))));
  const __m512 scale = _mm512_mul_ps(c.scale, _mm512_set1_ps(a.sa[m]));
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(bracket), scale);
  if (a.bias != nullptr) y = _mm512_add_ps(y, c.bias);
  const int64_t at = m * a.n + n;
  switch (a.y_type) {
    case Float::kFp32: _mm512_mask_storeu_ps(static_cast<float*>(a.y) + at, c.mask, y); break;
    case Float::kBf16:
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.y) + at, c.mask,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
      break;
    case Float::kFp16:
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.y) + at, c.mask,
                               _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
      break;
  }
}

// A panel for Tokens <= kDirectTokens tokens.
template <int Bits, int Tokens>
void direct_panel(const IntegerGemm& a, int64_t panel) {
  constexpr int kQuads = Expand<Bits>::kQuads;
  // One token alone would wait for the latency of each dot product.
  constexpr int kChains = Tokens == 1 ? std::min(4, kQuads) : std::min(2, kQuads);
  const Expand<Bits> expand;
  const int64_t n0 = panel * layout::kPanelRows;
  const uint32_t* w = chunk_words<Bits>(a.w, a.k, panel, 0);

  __m512i sum[Tokens][kTiles][kChains];
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<kChains>([&]<int U>() SLIDERQUANT_INLINE { sum[M][0][U] = sum[M][1][U] = _mm512_setzero_si512(); });
  });
  for (int64_t k = 0; k < a.k; k += layout::period_codes(Bits)) {
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      expand(w + T * layout::kVectorRows, [&]<int Q>(__m512i quad) SLIDERQUANT_INLINE {
        unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
          __m512i& into = sum[M][T][Q % kChains];
          into = _mm512_dpbusd_epi32(into, broadcast_quad(a.codes + M * a.k + k + 4 * Q), quad);
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

// Expands the codes of a chunk of a panel to [quads of k, 32].
template <int Bits>
void expand_chunk(const uint32_t* w, int64_t chunk, uint32_t* expanded) {
  const Expand<Bits> expand;
  for (int64_t k = 0; k < chunk; k += layout::period_codes(Bits)) {
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      expand(w + T * layout::kVectorRows, [&]<int Q>(__m512i quad) SLIDERQUANT_INLINE {
        _mm512_store_si512(expanded + Q * layout::kPanelRows + T * layout::kVectorRows, quad);
      });
    });
    w += layout::period_words(Bits) * layout::kPanelRows;
    expanded += Expand<Bits>::kQuads * layout::kPanelRows;
  }
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
      expand_chunk<Bits>(chunk_words<Bits>(a.w, a.k, panel, k0), chunk, expanded);
      Ahead ahead = chunk_after<Bits>(a.w, a.k, begin, panel, end, k0, chunk);
      for (int64_t block = 0; block < TokenBlocks::count(a.m); ++block) {
        const int64_t m = TokenBlocks::begin(a.m, block), count = TokenBlocks::begin(a.m, block + 1) - m;
        block_chunk_of(count, std::make_integer_sequence<int, kBlockTokens>{})(
            expanded, chunk / 4, blocks + (k0 * a.m + m * chunk) / 4,
            sums + (panel - begin) * panel_sums + m * layout::kPanelRows, ahead);
      }
    }
  }
  Columns columns[kSharingPanels * kTiles];
  const int64_t registers = (end - begin) * kTiles;
  for (int64_t i = 0; i < registers; ++i) {
    columns[i] = load_columns(a, begin * layout::kPanelRows + i * layout::kVectorRows);
  }
  for (int64_t m = 0; m < a.m; ++m, sums += layout::kPanelRows) {
    for (int64_t i = 0; i < registers; ++i) {
      const int32_t* sum = sums + i / kTiles * panel_sums + i % kTiles * layout::kVectorRows;
      store_row(a, columns[i], m, begin * layout::kPanelRows + i * layout::kVectorRows, _mm512_load_si512(sum));
    }
  }
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

using RunPanels = void (*)(const IntegerGemm&, const uint32_t*, int64_t, int64_t);

RunPanels panels_of(int bits) {
  switch (bits) {
    case 2: return panels<2>;
    case 3: return panels<3>;
    case 4: return panels<4>;
    default: return panels<8>;
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
  const RunPanels run = panels_of(a.bits);
  parallel_for(parallel, of.end - of.begin, panel_grain(a.m, a.k),
               [&](int64_t begin, int64_t end) { run(a, blocks, of.begin + begin, of.begin + end); });
}

}  // namespace

void integer_gemm(const IntegerGemm& a, Panels of, Parallel parallel) {
  for_super_tokens(a, [&](const IntegerGemm& part) { super_block(part, of, parallel); });
}

}  // namespace sliderquant::cpu::avx512
