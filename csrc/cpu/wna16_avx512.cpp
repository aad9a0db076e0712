// W*A16 for AVX512 (F, BW, DQ, VL) with BF16.
//
// Index names: n output channel, panel 32 of them, t half of a panel (one register), m token, k input channel,
// q pair of neighbouring k, g scale group, u independent accumulator chain.
//
// A code becomes an integer in bf16, which is exact, and meets pairs of x in vdpbf16ps; the scale of a group multiplies
// the fp32 sum. Nothing but the final result is rounded to 16 bits. fp16 x is split exactly into the sum of two bf16
// terms.
//
// Few tokens: codes go from memory through one shift and one vpermw straight into the dot product as
// (code - 2^(bits-1)); the rest of the zero point enters through the group's sum of x. More tokens: a chunk of a panel
// is expanded once into L1-sized scratch, its zero points subtracted, and reused by all of them, and x is first packed
// block by block of tokens, since rows that lie a power of two apart would compete for one cache set.
#include <algorithm>
#include <utility>

#include "api.h"
#include "avx512.h"
#include "expand_pairs.h"
#include "fixed_point.h"
#include "pack_tokens.h"
#include "wna16_epilogue.h"

namespace sliderquant::cpu::avx512 {
namespace {

constexpr int kChunk = 512;  // input channels per expansion: 32 * 512 * 2 bytes, two thirds of a 48 KB L1
static_assert(kChunk % 128 == 0, "a chunk must hold whole groups");

// Few turns per group, or the processor would mispredict their end.
constexpr int kPairsPerTurn = 4;
static_assert(layout::kBlockCodes / 2 % kPairsPerTurn == 0, "a group must be whole turns");

// Up to here fixed_point_wna16 is faster: making bf16 of 8 bits takes long, others are looked up. Measured.
constexpr int64_t few_tokens(int bits) { return bits == 8 ? 2 : 0; }
static_assert(few_tokens(8) <= kFixedPointTokens, "fixed_point_wna16 takes no more tokens");

constexpr int kNearBytes = 1024;

constexpr float kFarScale = 1 << 20;  // scales further apart than this never have one sum in common

SLIDERQUANT_INLINE inline __m512 dot(__m512 sum, __m512i pair, __m512i x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(x));
}

SLIDERQUANT_INLINE inline __m512i broadcast_pair(const uint16_t* x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// x in bf16 terms (one for bf16, two for fp16), and its group sums.
struct Activations {
  const uint16_t* rows;    // few tokens: [terms][m, k], rows row_stride apart
  int64_t row_stride;
  int64_t term_stride;
  const uint32_t* blocks;  // more tokens: [chunks of k][blocks of tokens][pair of k][terms][token]
  const float* group_sum;  // few tokens: [group][token], null when symmetric
};

// Of one group of one half panel.
struct GroupScale {
  __m512 scale;
  __m512 zero;  // 2^(bits-1) - zero point, in steps of the scale
};

// Of one group of a panel.
struct BlockScale {
  __m512 scale[kTiles];
  __m512 to_next[kTiles];  // scale / scale of the next group
};

SLIDERQUANT_INLINE inline GroupScale load_scale(const Wna16& a, int64_t g, int64_t n, __mmask16 mask) {
  GroupScale result = {_mm512_maskz_loadu_ps(mask, a.scale + g * a.n + n), _mm512_setzero_ps()};
  if (a.zero != nullptr) {
    const __m512i zero = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, a.zero + g * a.n + n));
    const __m512i centred = _mm512_sub_epi32(_mm512_set1_epi32(1 << (a.bits - 1)), zero);
    result.zero = _mm512_cvtepi32_ps(centred);
  }
  return result;
}

// A panel for Tokens <= kDirectTokens tokens.
template <int Bits, int Terms, int Tokens>
void direct_panel(const Wna16& a, const Activations& x, int64_t panel, const Expand<Bits, false>& expand) {
  constexpr int kPairs = Expand<Bits, false>::kPairs;
  // One token alone would wait for the latency of each dot product.
  constexpr int kChains = Tokens == 1 ? std::min(4, kPairs) : Tokens == 2 ? 2 : 1;
  const int64_t groups = a.k / a.group;
  const int64_t periods = a.group / layout::period_codes(Bits);
  const int64_t n0 = panel * layout::kPanelRows;
  const __mmask16 mask[kTiles] = {tail_mask(n0, a.n), tail_mask(n0 + 16, a.n)};
  const uint32_t* w = chunk_words<Bits>(a.w, a.k, panel, 0);

  __m512 y[Tokens][kTiles];
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE { y[M][0] = y[M][1] = _mm512_setzero_ps(); });
  for (int64_t g = 0; g < groups; ++g) {
    prefetch_scale(a, g, n0);
    __m512 sum[Tokens][kTiles][kChains];
    unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
      unroll<kChains>([&]<int U>() SLIDERQUANT_INLINE { sum[M][0][U] = sum[M][1][U] = _mm512_setzero_ps(); });
    });
    const uint16_t* x_g = x.rows + g * a.group;
    for (int64_t p = 0; p < periods; ++p) {
      expand(w, {}, [&]<int Q>(const Halves& pairs) SLIDERQUANT_INLINE {
        unroll<Terms>([&]<int Term>() SLIDERQUANT_INLINE {
          unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
            const __m512i x_pair = broadcast_pair(x_g + Term * x.term_stride + M * x.row_stride + 2 * Q);
            unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
              __m512& into = sum[M][T][Q % kChains];
              into = dot(into, pairs[T], x_pair);
            });
          });
        });
      });
      // Far ahead into L2 and a little ahead into L1: these products take as long as reading their weights, and that much
      // of L1 would be waiting for its turn.
      prefetch_period<Bits, kPrefetchBytes, _MM_HINT_T1>(w);
      prefetch_period<Bits, kNearBytes>(w);
      w += layout::period_words(Bits) * layout::kPanelRows;
      x_g += layout::period_codes(Bits);
    }
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      const GroupScale s = load_scale(a, g, n0 + T * layout::kVectorRows, mask[T]);
      unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
        __m512 total = sum[M][T][0];
        unroll<kChains - 1>([&]<int U>() SLIDERQUANT_INLINE { total = _mm512_add_ps(total, sum[M][T][U + 1]); });
        if (a.zero != nullptr) total = _mm512_fmadd_ps(s.zero, _mm512_set1_ps(x.group_sum[g * Tokens + M]), total);
        y[M][T] = _mm512_fmadd_ps(s.scale, total, y[M][T]);
      });
    });
  }
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE { store_row(a, M, n0 + T * layout::kVectorRows, y[M][T]); });
  });
}

// sums[m, 32] += what a run of groups, expanded to [groups, pairs of k, 32], gives for Tokens tokens, whose packed x is
// [groups, pairs of k, Terms, Tokens]. The sum of a group becomes one in units of the next group's scale, so that it
// never leaves its registers.
template <int Terms, int Tokens>
void block_run(const uint32_t* expanded, int64_t groups, int64_t pairs, const uint32_t* x, const BlockScale* scales,
               float* sums, Ahead& ahead) {
  __m512 sum[Tokens][kTiles];
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE { sum[M][0] = sum[M][1] = _mm512_setzero_ps(); });
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t q = 0; q < pairs; q += kPairsPerTurn) {
      unroll<kPairsPerTurn>([&]<int Q>() SLIDERQUANT_INLINE {
        const uint32_t* w = expanded + Q * layout::kPanelRows;
        const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + layout::kVectorRows);
        unroll<Terms * Tokens>([&]<int I>() SLIDERQUANT_INLINE {
          const __m512i pair = _mm512_set1_epi32(static_cast<int32_t>(x[Q * Terms * Tokens + I]));
          sum[I % Tokens][0] = dot(sum[I % Tokens][0], w0, pair);
          sum[I % Tokens][1] = dot(sum[I % Tokens][1], w1, pair);
        });
      });
      ahead.prefetch();
      expanded += kPairsPerTurn * layout::kPanelRows;
      x += kPairsPerTurn * Terms * Tokens;
    }
    if (g + 1 == groups) break;
    unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
      sum[M][0] = _mm512_mul_ps(sum[M][0], scales[g].to_next[0]);
      sum[M][1] = _mm512_mul_ps(sum[M][1], scales[g].to_next[1]);
    });
  }
  const __m512 scale[kTiles] = {scales[groups - 1].scale[0], scales[groups - 1].scale[1]};
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      float* into = sums + M * layout::kPanelRows + T * layout::kVectorRows;
      _mm512_store_ps(into, _mm512_fmadd_ps(scale[T], sum[M][T], _mm512_load_ps(into)));
    });
  });
}

using BlockRun = decltype(&block_run<1, 1>);

template <int Terms, int... Tokens>
BlockRun block_run_of(int64_t tokens, std::integer_sequence<int, Tokens...>) {
  static constexpr BlockRun table[] = {block_run<Terms, Tokens + 1>...};
  return table[tokens - 1];
}

// Loads the scales of the groups [first, first + count) of a panel. Returns where runs end: bit i is set where group
// i + 1 is the first of a run, because its scale is too far from that of the last run's first group.
uint32_t load_block_scales(const Wna16& a, int64_t first, int64_t count, int64_t n0, BlockScale* scales) {
  const auto is_far = [](__m512 ratio) SLIDERQUANT_INLINE -> __mmask16 {  // or no number
    const __mmask16 low = _mm512_cmp_ps_mask(ratio, _mm512_set1_ps(1 / kFarScale), _CMP_NGE_UQ);
    return low | _mm512_cmp_ps_mask(ratio, _mm512_set1_ps(kFarScale), _CMP_NLE_UQ);
  };
  uint32_t ends = 0;
  int64_t begin = 0;  // of the run
  for (int64_t i = 0; i < count; ++i) {
    prefetch_scale(a, first + i, n0);
    bool ends_before = false;
    for (int t = 0; t < kTiles; ++t) {
      const int64_t n = n0 + t * layout::kVectorRows;
      const __m512 scale = _mm512_maskz_loadu_ps(tail_mask(n, a.n), a.scale + (first + i) * a.n + n);
      scales[i].scale[t] = scale;
      if (i == 0) continue;
      scales[i - 1].to_next[t] = _mm512_div_ps(scales[i - 1].scale[t], scale);
      ends_before |= (is_far(_mm512_div_ps(scales[begin].scale[t], scale)) & tail_mask(n, a.n)) != 0;
    }
    if (!ends_before) continue;
    ends |= 1u << (i - 1);
    begin = i;
  }
  return ends;
}

// Expands the codes of a chunk of a panel, groups of it or a part of one, to [pairs of k, 32].
template <int Bits, bool HasZero>
void expand_chunk(const Wna16& a, int64_t panel, int64_t k0, int64_t chunk, const Expand<Bits, HasZero>& expand,
                  uint32_t* expanded) {
  const int64_t n0 = panel * layout::kPanelRows, part = std::min(a.group, chunk);
  const uint32_t* w = chunk_words<Bits>(a.w, a.k, panel, k0);
  for (int64_t first = k0; first < k0 + chunk; first += part) {
    __m512i zero[kTiles] = {};
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      if constexpr (HasZero) zero[T] = load_zero_bytes(a, first / a.group, n0 + T * layout::kVectorRows);
    });
    expand_pairs(expand, w, part, zero, expanded);
    w += layout::row_words(Bits, part) * layout::kPanelRows;
    expanded += part / 2 * layout::kPanelRows;
  }
}

// Up to kSharingPanels panels, for up to kSuperTokens tokens.
template <int Bits, int Terms, bool HasZero>
void block_panels(const Wna16& a, const Activations& x, int64_t begin, int64_t end,
                  const Expand<Bits, HasZero>& expand, uint32_t* expanded, float* sums) {
  const int64_t panel_sums = a.m * layout::kPanelRows;
  BlockScale scales[kChunk / layout::kBlockCodes];
  std::fill(sums, sums + (end - begin) * panel_sums, 0.0f);
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0);
    const int64_t part = std::min(a.group, chunk), parts = chunk / part;  // groups, or a part of one per channel
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t n0 = panel * layout::kPanelRows;
      expand_chunk(a, panel, k0, chunk, expand, expanded);
      Ahead ahead = chunk_after<Bits>(a.w, a.k, begin, panel, end, k0, chunk);
      const uint32_t ends = load_block_scales(a, k0 / a.group, parts, n0, scales);
      for (int64_t block = 0; block < TokenBlocks::count(a.m); ++block) {
        const int64_t m = TokenBlocks::begin(a.m, block), count = TokenBlocks::begin(a.m, block + 1) - m;
        const BlockRun run = block_run_of<Terms>(count, std::make_integer_sequence<int, kBlockTokens>{});
        const uint32_t* x_block = x.blocks + (k0 * a.m + m * chunk) / 2 * Terms;
        for (int64_t first = 0, last; first < parts; first = last + 1) {
          for (last = first; last + 1 < parts && (ends >> last & 1) == 0;) ++last;
          run(expanded + first * part / 2 * layout::kPanelRows, last + 1 - first, part / 2,
              x_block + first * part / 2 * count * Terms, scales + first,
              sums + (panel - begin) * panel_sums + m * layout::kPanelRows, ahead);
        }
      }
    }
  }
  for (int64_t m = 0; m < a.m; ++m, sums += layout::kPanelRows) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* sum = sums + (panel - begin) * panel_sums;
      store_row(a, m, panel * layout::kPanelRows, _mm512_load_ps(sum));
      store_row(a, m, panel * layout::kPanelRows + layout::kVectorRows, _mm512_load_ps(sum + layout::kVectorRows));
    }
  }
}

template <int Bits, int Terms>
void direct_panels(const Wna16& a, const Activations& x, int64_t begin, int64_t end) {
  const Expand<Bits, false> expand;
  for (int64_t panel = begin; panel < end; ++panel) {
    switch (a.m) {
      case 1: direct_panel<Bits, Terms, 1>(a, x, panel, expand); break;
      case 2: direct_panel<Bits, Terms, 2>(a, x, panel, expand); break;
      case 3: direct_panel<Bits, Terms, 3>(a, x, panel, expand); break;
      default: direct_panel<Bits, Terms, kDirectTokens>(a, x, panel, expand);
    }
  }
}

template <int Bits, int Terms, bool HasZero>
void shared_panels(const Wna16& a, const Activations& x, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  constexpr int64_t kExpanded = kChunk / 2 * layout::kPanelRows;
  const int64_t sharing = std::min<int64_t>(kSharingPanels, end - begin);
  auto* expanded = scratch.get<uint32_t>(kExpanded + sharing * a.m * layout::kPanelRows);
  auto* sums = reinterpret_cast<float*>(expanded + kExpanded);
  const Expand<Bits, HasZero> expand;
  for (; begin < end; begin += sharing) {
    block_panels<Bits, Terms, HasZero>(a, x, begin, std::min(begin + sharing, end), expand, expanded, sums);
  }
}

template <int Bits, int Terms>
void panels(const Wna16& a, const Activations& x, int64_t begin, int64_t end) {
  if (a.m <= kDirectTokens) {
    direct_panels<Bits, Terms>(a, x, begin, end);
  } else if (a.zero == nullptr) {
    shared_panels<Bits, Terms, false>(a, x, begin, end);
  } else {
    shared_panels<Bits, Terms, true>(a, x, begin, end);
  }
}

// Packs the rows of the tokens [begin, end), which are a block, where Activations::blocks has them.
void pack_block(const Wna16& a, const Activations& x, int terms, int64_t begin, int64_t end, uint32_t* blocks) {
  const int64_t count = end - begin;
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0);
    uint32_t* packed = blocks + (k0 * a.m + begin * chunk) / 2 * terms;
    for (int term = 0; term < terms; ++term) {
      const uint16_t* rows = x.rows + term * x.term_stride + begin * x.row_stride + k0;
      pack_tokens(rows, 2 * x.row_stride, count, chunk / 2, terms * count, packed + term * count);
    }
  }
}

// The panels given, for up to kSuperTokens tokens.
void super_block(const Wna16& a, Panels of, Parallel parallel) {
  thread_local Scratch split, pack, sums;
  const int64_t groups = a.k / a.group;
  const bool fp16 = a.x_type == Float::kFp16;
  const int terms = fp16 ? 2 : 1;
  Activations x = {a.x, a.x_stride, 0, nullptr, nullptr};
  uint16_t* high = fp16 ? split.get<uint16_t>(2 * a.m * a.k) : nullptr;
  if (fp16) x = {high, a.k, a.m * a.k, nullptr, nullptr};
  uint32_t* blocks = a.m > kDirectTokens ? pack.get<uint32_t>(a.m * a.k / 2 * terms) : nullptr;
  float* group_sum = a.zero != nullptr && a.m <= kDirectTokens ? sums.get<float>(a.m * groups) : nullptr;
  if (fp16 || blocks != nullptr || group_sum != nullptr) {
    parallel_for(parallel, TokenBlocks::count(a.m), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t m0 = TokenBlocks::begin(a.m, block), m1 = TokenBlocks::begin(a.m, block + 1);
        for (int64_t m = m0; m < m1; ++m) {
          const uint16_t* row = a.x + m * a.x_stride;
          if (fp16) split_row(row, a.k, high + m * a.k, high + (a.m + m) * a.k);
          if (group_sum != nullptr) sum_groups(row, a.x_type, groups, a.group, a.m, group_sum + m);
        }
        if (blocks != nullptr) pack_block(a, x, terms, m0, m1, blocks);
      }
    });
  }
  x.blocks = blocks;
  x.group_sum = group_sum;
  const auto run = layout::with_bits(a.bits, [&](auto bits) { return fp16 ? panels<bits, 2> : panels<bits, 1>; });
  parallel_for(parallel, of.end - of.begin, panel_grain(a.m, a.k),
               [&](int64_t begin, int64_t end) { run(a, x, of.begin + begin, of.begin + end); });
}

}  // namespace

void wna16(const Wna16& a, Panels of, Parallel parallel) {
  // Fixed point has no infinities.
  if (a.m <= few_tokens(a.bits) && fixed_point_wna16(a, of, parallel)) return;
  for_super_tokens(a, [&](const Wna16& part) { super_block(part, of, parallel); });
}

}  // namespace sliderquant::cpu::avx512
