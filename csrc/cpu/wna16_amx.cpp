// W*A16 for AMX; few tokens go to fixed_point_wna16.
//
// Index names: n output channel, panel 32 of them, t half of a panel (one register), m token, tile up to 16 of them,
// block two tiles, k input channel, step 32 of them, g scale group.
//
// A code less its zero point becomes an integer in bf16, which is exact, and meets pairs of x in tdpbf16ps. fp16 x is
// split exactly into the sum of two bf16 terms.
//
// Up to four tiles of tokens, and in fp16, nothing but the result is rounded to 16 bits: the fp32 sums of a group leave
// the tiles, and the scale of the group multiplies them on their way into the sums of all groups, which takes as long
// as the products. Of more tokens in bf16 the scale is multiplied into the expanded weights, and sums stay in the tiles
// from group to group. That costs an error of about 2^-8 of a weight at most, and 1.7e-3 of the result become 2.2e-3.
#include <algorithm>
#include <cstring>
#include <type_traits>

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

// Input channels per expansion, and panels that share a chunk of the tokens. What is expanded must stay in L1; of few
// tokens the chunks of all panels do too, and of many those of some panels meet one in L2. Measured.
struct Blocking {
  int64_t chunk, sharing;
};
inline Blocking blocking_for(const TokenTiles& tiles) {
  constexpr Blocking kFew = {128, 1}, kMany = {256, 16};
  static_assert(kFew.chunk % 128 == 0 && kMany.chunk % 128 == 0, "a chunk must hold whole groups");
  return tiles.blocks() == 1 ? kFew : kMany;
}

// Expands a chunk of the panel at n0.
template <int Bits, bool HasZero, class Scale>
void expand_chunk(const Wna16& a, const Expand<Bits, HasZero>& expand, const uint32_t* words, const uint32_t* ahead,
                  int64_t n0, int64_t k0, int64_t chunk, uint32_t* expanded) {
  constexpr int64_t kWords = layout::row_words(Bits, kStep) * layout::kPanelRows;
  const int64_t part = std::min(a.group, chunk);
  for (int64_t k = 0; k < chunk; k += part) {
    const int64_t g = (k0 + k) / a.group;
    prefetch_scale(a, g, n0);
    __m512i zero[kTiles] = {};
    Scale scale = {};
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      const int64_t n = n0 + T * layout::kVectorRows;
      if constexpr (HasZero) zero[T] = load_zero_bytes(a, g, n);
      if constexpr (std::is_same_v<Scale, Scaled>) scale.template set<T>(load_scale(a, g, n));
    });
    for (int64_t step = 0; step < part; step += kStep) {
      prefetch_words<kWords>(ahead);
      expand_pairs(expand, words, kStep, zero, expanded, scale);
      words += kWords;
      ahead += kWords;
      expanded += kStepWords;
    }
  }
}

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
      scale_[T] = load_scale(a, g, n0 + T * layout::kVectorRows);
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
template <int Terms, bool TwoTiles>
void multiply_block(const Wna16& a, const std::byte* x, const uint32_t* expanded, const Groups& groups, int64_t rows,
                    float* sums, GroupSums& group_sums) {
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

template <bool ScaleChannels>
void store_panels(const Wna16& a, int64_t begin, int64_t end, int64_t panel_sums, const float* sums) {
  for (int64_t m = 0; m < a.m; ++m, sums += layout::kPanelRows) {
    for (int64_t panel = begin; panel < end; ++panel) {
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
        const int64_t n = panel * layout::kPanelRows + T * layout::kVectorRows;
        __m512 sum = _mm512_load_ps(sums + (panel - begin) * panel_sums + T * layout::kVectorRows);
        if constexpr (ScaleChannels) sum = _mm512_mul_ps(sum, load_scale(a, 0, n));
        store_row(a, m, n, sum);
      });
    }
  }
}

template <int Bits, int Terms, bool HasZero>
void panels(const Wna16& a, const PackedTokens& packed, const std::byte* x, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const PanelRoom<float> room(scratch, packed, kStep, blocking_for(packed.tiles).sharing, a.k, begin, end);
  const Expand<Bits, HasZero> expand;
  GroupSums group_sums(packed.tiles.rows);
  std::fill(room.sums, room.sums + room.sums_count(), 0.0f);
  walk_chunks<Bits>(
      room.walk, a.w, room.expanded,
      [&](const uint32_t* words, const uint32_t* ahead, const auto& at, uint32_t* into) SLIDERQUANT_INLINE {
        expand_chunk<Bits, HasZero, Unscaled>(a, expand, words, ahead, at.panel * layout::kPanelRows, at.k,
                                              room.walk.chunk_at(at.k), into);
      },
      [&](const auto& at, const uint32_t* weights) SLIDERQUANT_INLINE {
        const int64_t chunk = room.walk.chunk_at(at.k), part = std::min(a.group, chunk);
        const Groups groups = {at.k / a.group, chunk / part, part / kStep, at.panel * layout::kPanelRows};
        for_blocks(packed, x, at.k / kStep, chunk / kStep, room.of(at),
                   [&]<bool Two>(const std::byte* tokens, float* into) SLIDERQUANT_INLINE {
                     multiply_block<Terms, Two>(a, tokens, weights, groups, packed.tiles.rows, into, group_sums);
                   });
      },
      [&](int64_t first, int64_t last) {
        group_sums.rest();
        store_panels<false>(a, first, last, room.panel_sums, room.sums);
        std::fill(room.sums, room.sums + (last - first) * room.panel_sums, 0.0f);
      });
}

// Sums stay in the tiles from group to group of a chunk. The scale of a group is multiplied into its weights, that of a
// whole channel into its sums in the end.
template <int Bits, int Terms, bool HasZero, class Scale>
void panels_of_many(const Wna16& a, const PackedTokens& packed, const std::byte* x, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const PanelRoom<float> room(scratch, packed, kStep, blocking_for(packed.tiles).sharing, a.k, begin, end);
  const Expand<Bits, HasZero> expand;
  walk_chunks<Bits>(
      room.walk, a.w, room.expanded,
      [&](const uint32_t* words, const uint32_t* ahead, const auto& at, uint32_t* into) SLIDERQUANT_INLINE {
        expand_chunk<Bits, HasZero, Scale>(a, expand, words, ahead, at.panel * layout::kPanelRows, at.k,
                                           room.walk.chunk_at(at.k), into);
      },
      [&](const auto& at, const uint32_t* weights) SLIDERQUANT_INLINE {
        const int64_t steps = room.walk.chunk_at(at.k) / kStep;
        const Passage passage = {at.k == 0, at.k > 0, true};
        for_blocks(packed, x, at.k / kStep, steps, room.of(at),
                   [&]<bool Two>(const std::byte* tokens, float* into) SLIDERQUANT_INLINE {
                     add_tiles<DotBf16, Terms, Two>(tokens, weights, steps, packed.tiles.rows, passage, into);
                   });
      },
      [&](int64_t first, int64_t last) {
        store_panels<std::is_same_v<Scale, Unscaled>>(a, first, last, room.panel_sums, room.sums);
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

template <int Bits, int Terms, bool HasZero>
RunPanels panels_of(bool many, bool grouped) {
  if (!many) return panels<Bits, Terms, HasZero>;
  if constexpr (Terms == 1) {
    if (grouped) return panels_of_many<Bits, Terms, HasZero, Scaled>;
  }
  return panels_of_many<Bits, Terms, HasZero, Unscaled>;
}

template <int Bits>
RunPanels panels_of(int terms, bool has_zero, bool many, bool grouped) {
  if (terms == 1) return has_zero ? panels_of<Bits, 1, true>(many, grouped) : panels_of<Bits, 1, false>(many, grouped);
  return has_zero ? panels_of<Bits, 2, true>(many, grouped) : panels_of<Bits, 2, false>(many, grouped);
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
  const bool grouped = a.group < a.k;
  const bool many = grouped ? tiles.blocks() > 2 && packed.terms == 1 : tiles.blocks() > 1;
  const RunPanels run = layout::with_bits(
      a.bits, [&](auto bits) { return panels_of<bits>(packed.terms, a.zero != nullptr, many, grouped); });
  parallel_for(parallel, of.end - of.begin, panel_grain(a.m, a.k),
               [&](int64_t begin, int64_t end) { run(a, packed, x, of.begin + begin, of.begin + end); });
}

}  // namespace

void wna16(const Wna16& a, Panels of, Parallel parallel) {
  for_super_tokens(a, [&](const Wna16& part) { super_block(part, of, parallel); });
}

}  // namespace sliderquant::cpu::amx
