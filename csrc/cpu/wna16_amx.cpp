// W*A16 for AMX; few tokens are left to the AVX512 kernels.
//
// Index names: n output channel, panel 32 of them, t half of a panel (one register), m token, tile up to 16 of them,
// block two tiles, k input channel, step 32 of them, g scale group.
//
// A code less its zero point becomes an integer in bf16, which is exact, and meets pairs of x in tdpbf16ps. The fp32
// sums of a group leave the tiles, and the scale of the group multiplies them on their way into the sums of all groups.
// Nothing but the final result is rounded to 16 bits. fp16 x is split exactly into the sum of two bf16 terms.
//
// While tiles multiply a chunk of a panel, vector units expand the next one, a step at a time, and add the sums of the
// group before: the processor looks some hundred cycles ahead, and a step of a block takes it 64.
#include <algorithm>
#include <cstring>

#include "amx.h"
#include "api.h"
#include "expand_pairs.h"
#include "pack_tokens.h"
#include "wna16_epilogue.h"

namespace sliderquant::cpu::amx {
namespace {

using namespace avx512;

constexpr int64_t kFewTokens = 0;  // up to here the AVX512 kernels are faster

constexpr int64_t kStep = kRowBytes / 2;  // input channels
constexpr int64_t kChunk = 256;           // input channels per expansion: two of them take 32 KB of a 48 KB L1
static_assert(kStep == layout::kBlockCodes, "a step must be whole periods and lie in one group");
static_assert(kChunk % 128 == 0, "a chunk must hold whole groups");

// Expands a chunk of a panel, a step with every call.
template <int Bits, bool HasZero>
struct Expansion {
  const Wna16& a;
  const Expand<Bits, HasZero>& expand;
  const uint32_t* words;
  uint32_t* expanded;
  int64_t n0, k;
  SLIDERQUANT_INLINE void operator()() {
    constexpr int64_t kWords = layout::row_words(Bits, kStep) * layout::kPanelRows;
    unroll<kWords / 16>([&]<int I>() SLIDERQUANT_INLINE {
      _mm_prefetch(reinterpret_cast<const char*>(words) + kPrefetchBytes + 64 * I, _MM_HINT_T0);
    });
    __m512i zero[kTiles] = {};
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      if constexpr (HasZero) zero[T] = load_zero_pairs(a, k / a.group, n0 + T * layout::kVectorRows);
    });
    expand_pairs(expand, words, kStep, zero, expanded);
    words += kWords;
    expanded += kStepWords;
    k += kStep;
  }
};

// sums[tokens, 32] += scale * (what one or two tiles of each sum held)
template <bool Two>
SLIDERQUANT_INLINE inline void add_group(const Wna16& a, int64_t g, int64_t n0, int64_t tokens, const float* even,
                                         const float* odd, float* sums) {
  __m512 scale[kTiles];
  unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
    const int64_t n = n0 + T * layout::kVectorRows;
    scale[T] = _mm512_maskz_loadu_ps(tail_mask(n, a.n), a.scale + g * a.n + n);
  });
  for (int64_t m = 0; m < tokens; ++m) {
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      const int64_t at = m * layout::kPanelRows + T * layout::kVectorRows;
      __m512 sum = _mm512_load_ps(even + at);
      if constexpr (Two) sum = _mm512_add_ps(sum, _mm512_load_ps(odd + at));
      _mm512_store_ps(sums + at, _mm512_fmadd_ps(scale[T], sum, _mm512_load_ps(sums + at)));
    });
  }
}

// Of the groups in a chunk, or of the part of one that it is.
struct Groups {
  int64_t first, count, steps, n0;
};

constexpr int64_t kTileSums = kTileRows * layout::kPanelRows;

// sums[tokens of the block, 32] += what a chunk gives, for two tiles of tokens.
template <int Terms, class Next>
void two_tiles(const Wna16& a, const std::byte* x, const uint32_t* expanded, const Groups& groups, int64_t rows,
               float* sums, Next& next) {
  alignas(64) float group_sums[2][2 * kTileSums];
  const int64_t tile_bytes = rows * kRowBytes;
  for (int64_t g = 0; g < groups.count; ++g) {
    zero_tiles<kSum00, 4>();
    for (int64_t step = 0; step < groups.steps; ++step) {
      load_weights(expanded);
      unroll<Terms>([&]<int>() SLIDERQUANT_INLINE {
        dot_two<DotBf16>(x, tile_bytes);
        x += 2 * tile_bytes;
      });
      next.turn();
      expanded += kStepWords;
    }
    store_sums<kSum00>(group_sums[g % 2]);
    store_sums<kSum10>(group_sums[g % 2] + rows * layout::kPanelRows);
    if (g > 0) add_group<false>(a, groups.first + g - 1, groups.n0, 2 * rows, group_sums[(g - 1) % 2], nullptr, sums);
  }
  const int64_t g = groups.count - 1;
  add_group<false>(a, groups.first + g, groups.n0, 2 * rows, group_sums[g % 2], nullptr, sums);
}

// The same for one tile; steps take turns between two sets of sums.
template <int Terms, class Next>
void one_tile(const Wna16& a, const std::byte* x, const uint32_t* expanded, const Groups& groups, int64_t rows,
              float* sums, Next& next) {
  alignas(64) float group_sums[2][2][kTileSums];
  const int64_t tile_bytes = rows * kRowBytes;
  const auto add = [&](int64_t g) SLIDERQUANT_INLINE {
    add_group<true>(a, groups.first + g, groups.n0, rows, group_sums[g % 2][0], group_sums[g % 2][1], sums);
  };
  for (int64_t g = 0; g < groups.count; ++g) {
    zero_tiles<kSum00, 4>();
    for (int64_t step = 0; step < groups.steps; step += 2) {
      load_weights(expanded);
      unroll<Terms>([&]<int Term>() SLIDERQUANT_INLINE { dot_one<DotBf16, false>(x + Term * tile_bytes); });
      next.turn();
      x += Terms * tile_bytes;
      expanded += kStepWords;
      if (step + 1 == groups.steps) break;
      load_weights(expanded);
      unroll<Terms>([&]<int Term>() SLIDERQUANT_INLINE { dot_one<DotBf16, true>(x + Term * tile_bytes); });
      next.turn();
      x += Terms * tile_bytes;
      expanded += kStepWords;
    }
    store_sums<kSum00>(group_sums[g % 2][0]);
    store_sums<kSum10>(group_sums[g % 2][1]);
    if (g > 0) add(g - 1);
  }
  add(groups.count - 1);
}

void store_panels(const Wna16& a, int64_t begin, int64_t end, int64_t panel_sums, const float* sums) {
  for (int64_t m = 0; m < a.m; ++m, sums += layout::kPanelRows) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* sum = sums + (panel - begin) * panel_sums;
      store_row(a, m, panel * layout::kPanelRows, _mm512_load_ps(sum));
      store_row(a, m, panel * layout::kPanelRows + layout::kVectorRows, _mm512_load_ps(sum + layout::kVectorRows));
    }
  }
}

template <int Bits, int Terms, bool HasZero>
void panels(const Wna16& a, const PackedTokens& packed, const std::byte* x, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const TokenTiles tiles = packed.tiles;
  const int64_t sharing = tiles.blocks() == 1 ? 1 : std::min<int64_t>(kSharingPanels, end - begin);
  const int64_t panel_sums = tiles.tokens() * layout::kPanelRows;
  constexpr int64_t kExpanded = kChunk / kStep * kStepWords;
  auto* expanded = scratch.get<uint32_t>(2 * kExpanded + sharing * panel_sums);
  auto* sums = reinterpret_cast<float*>(expanded + 2 * kExpanded);
  const Expand<Bits, HasZero> expand;
  const TileState state(tiles.rows);
  walk_chunks<kChunk, kStep>(
      {begin, end, sharing, a.k}, tiles.blocks(), expanded,
      [&](int64_t panel, int64_t k, uint32_t* into) SLIDERQUANT_INLINE {
        return Expansion<Bits, HasZero>{a, expand, chunk_words<Bits>(a.w, a.k, panel, k), into,
                                        panel * layout::kPanelRows, k};
      },
      [&](int64_t group, int64_t panel, int64_t k, const uint32_t* weights, auto& next) SLIDERQUANT_INLINE {
        float* into = sums + (panel - group) * panel_sums;
        if (k == 0) std::fill(into, into + panel_sums, 0.0f);
        const int64_t chunk = std::min(kChunk, a.k - k), part = std::min(a.group, chunk);
        const Groups groups = {k / a.group, chunk / part, part / kStep, panel * layout::kPanelRows};
        for (int64_t block = 0; block < tiles.blocks(); ++block) {
          const std::byte* tokens = x + packed.block(k / kStep, chunk / kStep, block);
          if (2 * block + 1 < tiles.count) {
            two_tiles<Terms>(a, tokens, weights, groups, tiles.rows, into, next);
          } else {
            one_tile<Terms>(a, tokens, weights, groups, tiles.rows, into, next);
          }
          into += 2 * tiles.rows * layout::kPanelRows;
        }
      },
      [&](int64_t first, int64_t last) { store_panels(a, first, last, panel_sums, sums); });
}

// Packs the rows of a tile of tokens where PackedTokens has them.
void pack_tile(const Wna16& a, const PackedTokens& packed, int64_t tile, std::byte* x) {
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t steps = std::min(kChunk, a.k - k0) / kStep;
    for (int64_t step = 0; step < steps; ++step) {
      for (int term = 0; term < packed.terms; ++term) {
        std::byte* to = x + packed.tile(k0 / kStep, steps, step, tile, term);
        if (tile == packed.tiles.count - 1) std::memset(to, 0, packed.tiles.rows * kRowBytes);
      }
      const int64_t first = tile * packed.tiles.rows, last = std::min(first + packed.tiles.rows, a.m);
      std::byte* to = x + packed.tile(k0 / kStep, steps, step, tile, 0);
      std::byte* low = x + packed.tile(k0 / kStep, steps, step, tile, 1);
      for (int64_t m = first; m < last; ++m) {
        const uint16_t* from = a.x + m * a.x_stride + k0 + step * kStep;
        const int64_t at = (m - first) * kRowBytes;
        if (packed.terms == 1) {
          std::memcpy(to + at, from, kRowBytes);
        } else {
          split_row(from, kStep, reinterpret_cast<uint16_t*>(to + at), reinterpret_cast<uint16_t*>(low + at));
        }
      }
    }
  }
}

using RunPanels = void (*)(const Wna16&, const PackedTokens&, const std::byte*, int64_t, int64_t);

template <int Bits>
RunPanels panels_of(int terms, bool has_zero) {
  if (terms == 1) return has_zero ? panels<Bits, 1, true> : panels<Bits, 1, false>;
  return has_zero ? panels<Bits, 2, true> : panels<Bits, 2, false>;
}

RunPanels panels_of(int bits, int terms, bool has_zero) {
  switch (bits) {
    case 2: return panels_of<2>(terms, has_zero);
    case 3: return panels_of<3>(terms, has_zero);
    case 4: return panels_of<4>(terms, has_zero);
    default: return panels_of<8>(terms, has_zero);
  }
}

// The panels given, for up to kSuperTokens tokens.
void super_block(const Wna16& a, Panels of, Parallel parallel) {
  if (a.m <= kFewTokens) return avx512::wna16(a, of, parallel);
  thread_local Scratch pack;
  const PackedTokens packed = {TokenTiles(a.m), a.x_type == Float::kFp16 ? 2 : 1};
  std::byte* x = pack.get<std::byte>(packed.bytes(a.k / kStep));
  parallel_for(parallel, packed.tiles.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) pack_tile(a, packed, tile, x);
  });
  const RunPanels run = panels_of(a.bits, packed.terms, a.zero != nullptr);
  parallel_for(parallel, of.end - of.begin, panel_grain(a.m, a.k),
               [&](int64_t begin, int64_t end) { run(a, packed, x, of.begin + begin, of.begin + end); });
}

}  // namespace

void wna16(const Wna16& a, Panels of, Parallel parallel) {
  for_super_tokens(a, [&](const Wna16& part) { super_block(part, of, parallel); });
}

}  // namespace sliderquant::cpu::amx
