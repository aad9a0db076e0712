// W*A16 for AMX; few tokens go to fixed_point_wna16.
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
//
// The scales could be multiplied into the weights, as those who round dequantized weights to bf16 do. That would save
// the way of the sums through memory, but cost 2^-9 of every weight and most of what it saves in the expansion.
#include <algorithm>
#include <cstring>

#include "amx.h"
#include "api.h"
#include "expand_pairs.h"
#include "fixed_point.h"
#include "pack_tokens.h"
#include "wna16_epilogue.h"

namespace sliderquant::cpu::amx {
namespace {

using namespace avx512;

// Up to here fixed_point_wna16 is faster. Measured; expanding 8 bits takes long.
constexpr int64_t few_tokens(int bits) { return bits == 8 ? 4 : 2; }
static_assert(few_tokens(8) <= kFixedPointTokens, "fixed_point_wna16 takes no more tokens");

constexpr int64_t kStep = kRowBytes / 2;  // input channels
static_assert(kStep == layout::kBlockCodes, "a step must be whole periods and lie in one group");

// Input channels per expansion, and panels that share a chunk of the tokens. Few tokens wait for what is expanded, which
// must still be in L1; with many of them a small chunk of theirs leaves L2 to the sums. Measured.
struct Blocking {
  int64_t chunk, sharing;
};
inline Blocking blocking_for(const TokenTiles& tiles) {
  constexpr Blocking kFew = {128, 1}, kSome = {256, 8}, kMany = {128, 32};
  static_assert(kFew.chunk % 128 == 0 && kSome.chunk % 128 == 0 && kMany.chunk % 128 == 0,
                "a chunk must hold whole groups");
  return tiles.blocks() == 1 ? kFew : tiles.blocks() <= 4 ? kSome : kMany;
}

// Expands a chunk of a panel, a step with every call.
template <int Bits, bool HasZero>
struct Expansion {
  const Wna16& a;
  const Expand<Bits, HasZero>& expand;
  const uint32_t *words, *ahead;
  uint32_t* expanded;
  int64_t n0, g, part;  // the group of the next step, and its input channels within the chunk
  int64_t left = 0;     // of the present group
  __m512i zero[kTiles] = {};

  SLIDERQUANT_INLINE void step() {
    constexpr int64_t kWords = layout::row_words(Bits, kStep) * layout::kPanelRows;
    prefetch_words<kWords>(ahead);
    if (left == 0) {
      left = part;
      prefetch_scale(a, g + kScalePrefetch, n0);
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
        if constexpr (HasZero) zero[T] = load_zero_bytes(a, g, n0 + T * layout::kVectorRows);
      });
      ++g;
    }
    expand_pairs(expand, words, kStep, zero, expanded);
    words += kWords;
    ahead += kWords;
    expanded += kStepWords;
    left -= kStep;
  }
};

// The sums of a group, on their way from tiles to the sums of all groups: some rows with every turn of the group that
// follows. All at once, their stores would fill the processor's buffer of them and keep it from looking further ahead.
class GroupSums {
 public:
  explicit GroupSums(int64_t rows) : rows_(rows) {}

  // Where to store tiles; what was there has been added.
  float* buffer() { return buffers_[buffer_]; }

  // Of `tokens` tokens the buffer holds sums, of which there are two to be added if steps took turns; they are added
  // within so many turns.
  SLIDERQUANT_INLINE void add(const Wna16& a, int64_t g, int64_t n0, int64_t tokens, bool both, int64_t turns,
                              float* sums) {
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      const int64_t n = n0 + T * layout::kVectorRows;
      scale_[T] = _mm512_maskz_loadu_ps(tail_mask(n, a.n), a.scale + g * a.n + n);
    });
    from_ = buffers_[buffer_];
    buffer_ ^= 1;
    sums_ = sums;
    done_ = 0;
    tokens_ = tokens;
    both_ = both;
    per_turn_ = (tokens + turns - 1) / turns;
  }
  SLIDERQUANT_INLINE void turn() { rows(std::min(per_turn_, tokens_ - done_)); }
  SLIDERQUANT_INLINE void rest() { rows(tokens_ - done_); }

 private:
  SLIDERQUANT_INLINE void rows(int64_t count) {
    const __m512 scale[kTiles] = {scale_[0], scale_[1]};
    const float* from = from_ + done_ * layout::kPanelRows;
    float* sums = sums_ + done_ * layout::kPanelRows;
    done_ += count;
    const auto each = [&](const auto& sum_at) SLIDERQUANT_INLINE {
      for (const float* end = from + count * layout::kPanelRows; from < end; from += layout::kPanelRows) {
        unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
          float* into = sums + T * layout::kVectorRows;
          const __m512 sum = sum_at(from + T * layout::kVectorRows);
          _mm512_store_ps(into, _mm512_fmadd_ps(scale[T], sum, _mm512_load_ps(into)));
        });
        sums += layout::kPanelRows;
      }
    };
    if (both_) {
      const int64_t apart = rows_ * layout::kPanelRows;
      each([&](const float* at) SLIDERQUANT_INLINE {
        return _mm512_add_ps(_mm512_load_ps(at), _mm512_load_ps(at + apart));
      });
    } else {
      each([](const float* at) SLIDERQUANT_INLINE { return _mm512_load_ps(at); });
    }
  }

  alignas(64) float buffers_[2][2 * kTileRows * layout::kPanelRows];
  __m512 scale_[kTiles];
  const float* from_ = buffers_[0];
  float* sums_ = buffers_[1];
  int64_t rows_, tokens_ = 0, done_ = 0, per_turn_ = 0, buffer_ = 0;
  bool both_ = false;
};

// Of the groups in a chunk, or of the part of one that it is.
struct Groups {
  int64_t first, count, steps, n0;
};

// sums[tokens of the block, 32] += what a chunk gives, for one tile of tokens or two. With one, steps take turns between
// two sets of sums.
template <int Terms, bool TwoTiles, class Next>
void multiply_block(const Wna16& a, const std::byte* x, const uint32_t* expanded, const Groups& groups, int64_t rows,
                    float* sums, GroupSums& group_sums, Next& next) {
  const int64_t tile_bytes = rows * kRowBytes;
  for (int64_t g = 0; g < groups.count; ++g) {
    zero_tiles<kSum00, 4>();
    const auto step = [&]<bool Odd>() SLIDERQUANT_INLINE {
      load_weights(expanded);
      unroll<Terms>([&]<int>() SLIDERQUANT_INLINE {
        if constexpr (TwoTiles) {
          dot_two<DotBf16>(x, tile_bytes);
        } else {
          dot_one<DotBf16, Odd>(x);
        }
        x += (TwoTiles ? 2 : 1) * tile_bytes;
      });
      next.turn();
      group_sums.turn();
      expanded += kStepWords;
    };
    for (int64_t i = 0; i < groups.steps; i += 2) {
      step.template operator()<false>();
      if (i + 1 < groups.steps) step.template operator()<true>();
    }
    group_sums.rest();
    store_sums<kSum00>(group_sums.buffer());
    store_sums<kSum10>(group_sums.buffer() + rows * layout::kPanelRows);
    group_sums.add(a, groups.first + g, groups.n0, (TwoTiles ? 2 : 1) * rows, !TwoTiles, groups.steps, sums);
  }
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
  const int64_t sharing = std::min(blocking_for(tiles).sharing, end - begin);
  const int64_t panel_sums = tiles.tokens() * layout::kPanelRows;
  const int64_t room = 2 * packed.chunk / kStep * kStepWords;
  auto* expanded = scratch.get<uint32_t>(room + sharing * panel_sums);
  auto* sums = reinterpret_cast<float*>(expanded + room);
  const Expand<Bits, HasZero> expand;
  const Walk walk = {begin, end, sharing, a.k, packed.chunk};
  const TileState state(tiles.rows);
  GroupSums group_sums(tiles.rows);
  std::fill(sums, sums + sharing * panel_sums, 0.0f);
  walk_chunks<Bits, kStep>(
      walk, a.w, tiles.blocks(), expanded,
      [&](const uint32_t* words, const uint32_t* ahead, const auto& at, uint32_t* into) SLIDERQUANT_INLINE {
        return Expansion<Bits, HasZero>{a, expand, words, ahead, into, at.panel * layout::kPanelRows, at.k / a.group,
                                        std::min(a.group, walk.chunk_at(at.k))};
      },
      [&](const auto& at, const uint32_t* weights, auto& next) SLIDERQUANT_INLINE {
        const int64_t chunk = walk.chunk_at(at.k), part = std::min(a.group, chunk), steps = chunk / kStep;
        const Groups groups = {at.k / a.group, chunk / part, part / kStep, at.panel * layout::kPanelRows};
        for (int64_t block = 0; block < tiles.blocks(); ++block) {
          const std::byte* tokens = x + packed.block(at.k / kStep, steps, block);
          float* into = sums + (at.panel - at.first) * panel_sums + 2 * block * tiles.rows * layout::kPanelRows;
          if (2 * block + 1 < tiles.count) {
            multiply_block<Terms, true>(a, tokens, weights, groups, tiles.rows, into, group_sums, next);
          } else {
            multiply_block<Terms, false>(a, tokens, weights, groups, tiles.rows, into, group_sums, next);
          }
        }
      },
      [&](int64_t first, int64_t last) {
        group_sums.rest();
        store_panels(a, first, last, panel_sums, sums);
        std::fill(sums, sums + (last - first) * panel_sums, 0.0f);
      });
}

// Packs the rows of a tile of tokens where PackedTokens has them.
void pack_tile(const Wna16& a, const PackedTokens& packed, int64_t tile, std::byte* x) {
  for (int64_t row = 0; row < packed.tiles.rows; ++row) {
    const int64_t m = tile * packed.tiles.rows + row;
    const uint16_t* from = a.x + m * a.x_stride;
    for (int64_t k0 = 0; k0 < a.k; k0 += packed.chunk) {
      const int64_t steps = std::min(packed.chunk, a.k - k0) / kStep;
      for (int64_t step = 0; step < steps; ++step) {
        std::byte* term[2];
        for (int i = 0; i < packed.terms; ++i) {
          term[i] = x + packed.tile(k0 / kStep, steps, step, tile, i) + row * kRowBytes;
          if (m >= a.m) _mm512_store_si512(term[i], _mm512_setzero_si512());
        }
        if (m >= a.m) continue;
        const uint16_t* values = from + k0 + step * kStep;
        if (packed.terms == 1) {
          _mm512_store_si512(term[0], _mm512_loadu_si512(values));
        } else {
          split_row(values, kStep, reinterpret_cast<uint16_t*>(term[0]), reinterpret_cast<uint16_t*>(term[1]));
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
  if (a.m <= few_tokens(a.bits)) {
    // Fixed point has no infinities.
    if (!fixed_point_wna16(a, of, parallel)) avx512::wna16(a, of, parallel);
    return;
  }
  thread_local Scratch pack;
  const TokenTiles tiles(a.m);
  const PackedTokens packed = {tiles, a.x_type == Float::kFp16 ? 2 : 1, blocking_for(tiles).chunk};
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
