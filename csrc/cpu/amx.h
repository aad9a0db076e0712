// What the AMX kernels share: tile registers, and the shape in which tokens and weights enter them. Included by files
// compiled for AMX only.
//
// A tile product adds to sums [tokens, 16 channels] what [tokens, 64 bytes of k] gives with [16, 16 channels of 4 bytes
// of k each]. The latter are rows of an expanded panel, whose 32 channels make two of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../layout.h"
#include "api.h"
#include "avx512.h"

namespace sliderquant::cpu::amx {

using avx512::kTiles;

constexpr int kTileRows = 16;
constexpr int kRowBytes = 64;
static_assert(kRowBytes == layout::kVectorRows * 4, "a row of weights or sums in a tile is one register of channels");

// A step of the loop over k is one row of a tokens' tile: 64 codes or 32 values of 16 bits.
constexpr int64_t kPanelBytes = layout::kPanelRows * 4;  // from a row of an expanded panel, or of its sums, to the next
constexpr int64_t kStepWords = kTileRows * layout::kPanelRows;  // of an expanded panel

// Eight registers: a block of 2 x 2 sums meets two tiles of tokens and two of weights, so that each tile that is
// loaded is used twice.
enum Tile { kSum00, kSum01, kSum10, kSum11, kTokens0, kTokens1, kWeights0, kWeights1 };

// Tokens in nearly equal tiles of at most 16, with rows of zeros behind the last ones.
struct TokenTiles {
  int64_t count, rows;
  explicit TokenTiles(int64_t tokens)
      : count((tokens + kTileRows - 1) / kTileRows), rows((tokens + count - 1) / count) {}
  int64_t tokens() const { return count * rows; }
  int64_t blocks() const { return (count + 1) / 2; }
};

// Sets up the tile registers of this thread, and leaves them as they were: other libraries use them on it too.
class TileState {
 public:
  explicit TileState(int64_t token_rows) {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Config config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = kRowBytes;
      config.rows[tile] = tile < kWeights0 ? static_cast<uint8_t>(token_rows) : kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileState() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64, "the processor reads 64 bytes");
  Config before_;
};

// The compiler's own intrinsics do not say that they read memory.
template <int Tile>
SLIDERQUANT_INLINE inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
SLIDERQUANT_INLINE inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
SLIDERQUANT_INLINE inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

struct DotInt8 {  // unsigned codes of tokens, signed ones of weights
  template <int Sum, int Tokens, int Weights>
  SLIDERQUANT_INLINE static void add() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Tokens), "i"(Weights));
  }
};

struct DotBf16 {
  template <int Sum, int Tokens, int Weights>
  SLIDERQUANT_INLINE static void add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Tokens), "i"(Weights));
  }
};

SLIDERQUANT_INLINE inline void load_weights(const uint32_t* expanded) {
  load_tile<kWeights0>(expanded, kPanelBytes);
  load_tile<kWeights1>(expanded + layout::kVectorRows, kPanelBytes);
}

// The sums of two tiles of tokens, each so many bytes.
template <class Dot>
SLIDERQUANT_INLINE inline void dot_two(const std::byte* tokens, int64_t tile_bytes) {
  load_tile<kTokens0>(tokens, kRowBytes);
  Dot::template add<kSum00, kTokens0, kWeights0>();
  Dot::template add<kSum01, kTokens0, kWeights1>();
  load_tile<kTokens1>(tokens + tile_bytes, kRowBytes);
  Dot::template add<kSum10, kTokens1, kWeights0>();
  Dot::template add<kSum11, kTokens1, kWeights1>();
}

// Those of one tile of tokens, in one half of the registers. A product waits 52 cycles for the one before it into the
// same sums, so steps take turns between the halves.
template <class Dot, bool SecondHalf>
SLIDERQUANT_INLINE inline void dot_one(const std::byte* tokens) {
  constexpr int kTokens = SecondHalf ? kTokens1 : kTokens0, kSum = SecondHalf ? kSum10 : kSum00;
  load_tile<kTokens>(tokens, kRowBytes);
  Dot::template add<kSum, kTokens, kWeights0>();
  Dot::template add<kSum + 1, kTokens, kWeights1>();
}

template <int First, int Count>
SLIDERQUANT_INLINE inline void zero_tiles() {
  unroll<Count>([]<int I>() SLIDERQUANT_INLINE { zero_tile<First + I>(); });
}

// The two tiles of sums of one tile of tokens, to or from rows of 32 channels.
template <int First>
SLIDERQUANT_INLINE inline void store_sums(void* sums) {
  store_tile<First>(sums, kPanelBytes);
  store_tile<First + 1>(static_cast<std::byte*>(sums) + kRowBytes, kPanelBytes);
}

template <int First>
SLIDERQUANT_INLINE inline void load_sums(const void* sums) {
  load_tile<First>(sums, kPanelBytes);
  load_tile<First + 1>(static_cast<const std::byte*>(sums) + kRowBytes, kPanelBytes);
}

// How sums enter and leave the registers of a block.
struct Passage {
  bool zero, load, store;
};

// sums[tokens of the block, 32] += what a chunk gives, for two tiles of tokens.
template <class Dot, int Terms, class Sum>
SLIDERQUANT_INLINE inline void two_tiles(const std::byte* tokens, const uint32_t* expanded, int64_t steps, int64_t rows,
                                         Passage passage, Sum* sums) {
  const int64_t tile_bytes = rows * kRowBytes;
  Sum* second = sums + rows * layout::kPanelRows;
  if (passage.zero) zero_tiles<kSum00, 4>();
  if (passage.load) load_sums<kSum00>(sums), load_sums<kSum10>(second);
  for (int64_t step = 0; step < steps; ++step) {
    load_weights(expanded);
    unroll<Terms>([&]<int>() SLIDERQUANT_INLINE {
      dot_two<Dot>(tokens, tile_bytes);
      tokens += 2 * tile_bytes;
    });
    expanded += kStepWords;
  }
  if (passage.store) store_sums<kSum00>(sums), store_sums<kSum10>(second);
}

// The same for one tile; steps take turns between two sets of sums.
template <class Dot, int Terms, class Sum>
SLIDERQUANT_INLINE inline void one_tile(const std::byte* tokens, const uint32_t* expanded, int64_t steps, int64_t rows,
                                        Passage passage, Sum* sums) {
  if (passage.zero) zero_tiles<kSum00, 2>();
  if (passage.load) load_sums<kSum00>(sums);
  if (passage.zero || passage.load) zero_tiles<kSum10, 2>();
  const auto step = [&]<bool Odd>() SLIDERQUANT_INLINE {
    load_weights(expanded);
    unroll<Terms>([&]<int>() SLIDERQUANT_INLINE {
      dot_one<Dot, Odd>(tokens);
      tokens += rows * kRowBytes;
    });
    expanded += kStepWords;
  };
  for (int64_t i = 0; i < steps; i += 2) {
    step.template operator()<false>();
    if (i + 1 < steps) step.template operator()<true>();
  }
  if (!passage.store) return;
  alignas(64) Sum odd[kTileRows * layout::kPanelRows];
  store_sums<kSum00>(sums);
  store_sums<kSum10>(odd);
  for (int64_t i = 0; i < rows * layout::kPanelRows; i += layout::kVectorRows) {
    if constexpr (std::is_same_v<Sum, float>) {
      _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(odd + i)));
    } else {
      _mm512_store_si512(sums + i, _mm512_add_epi32(_mm512_load_si512(sums + i), _mm512_load_si512(odd + i)));
    }
  }
}

template <class Dot, int Terms, bool TwoTiles, class Sum>
SLIDERQUANT_INLINE inline void add_tiles(const std::byte* tokens, const uint32_t* expanded, int64_t steps, int64_t rows,
                                         Passage passage, Sum* sums) {
  if constexpr (TwoTiles) {
    two_tiles<Dot, Terms>(tokens, expanded, steps, rows, passage, sums);
  } else {
    one_tile<Dot, Terms>(tokens, expanded, steps, rows, passage, sums);
  }
}

// Where a step of tokens lies that were packed to [chunks of k][blocks of two tiles][steps][terms][tiles][rows of 64
// bytes], a compact copy: rows that lie a power of two apart compete for one cache set.
struct PackedTokens {
  TokenTiles tiles;
  int terms;      // that x is the sum of
  int64_t chunk;  // input channels
  int64_t step_bytes() const { return terms * tiles.rows * kRowBytes; }  // of one tile
  int64_t bytes(int64_t steps) const { return tiles.count * steps * step_bytes(); }
  // Of block `block` in the chunk that comes after `before` steps and has `steps`.
  int64_t block(int64_t before, int64_t steps, int64_t block) const {
    return (tiles.count * before + 2 * block * steps) * step_bytes();
  }
  int64_t tile(int64_t before, int64_t steps, int64_t step, int64_t tile, int term) const {
    const int64_t together = tile / 2 * 2 + 1 < tiles.count ? 2 : 1;
    const int64_t within = (step * terms + term) * together + tile % 2;
    return block(before, steps, tile / 2) + within * tiles.rows * kRowBytes;
  }
};

// The order of the panels [begin, end): `sharing` of them meet a chunk of the tokens while that is in L2.
struct Walk {
  int64_t begin, end, sharing;
  int64_t k_count, chunk;  // input channels, and how many are expanded at a time

  struct Position {
    int64_t first, panel, k;  // first panel of those that share
  };
  int64_t last(int64_t first) const { return std::min(first + sharing, end); }
  int64_t chunk_at(int64_t k) const { return std::min(chunk, k_count - k); }
  bool ends_sharing(const Position& at) const {
    return at.panel + 1 >= last(at.first) && at.k + chunk >= k_count;
  }
  Position after(const Position& at) const {
    if (at.panel + 1 < last(at.first)) return {at.first, at.panel + 1, at.k};
    if (at.k + chunk < k_count) return {at.first, at.first, at.k + chunk};
    return {last(at.first), last(at.first), 0};
  }
};

// For each position calls expand(words, ahead, it, expanded) and multiply(it, expanded), and store(first, last) when
// panels that share are done. expand is to fetch what lies at ahead.
//
// One after the other, into one place: expanding the next chunk meanwhile, on vector units that tiles leave free, would
// take twice the room in L1, and stores that lie a multiple of 4 KB from the tiles that are loaded would hold those up.
// Measured; it is slower.
template <int Bits, class Expand, class Multiply, class Store>
SLIDERQUANT_INLINE inline void walk_chunks(const Walk& walk, const uint32_t* w, uint32_t* expanded,
                                           const Expand& expand, const Multiply& multiply, const Store& store) {
  const auto words_at = [&](const Walk::Position& at) SLIDERQUANT_INLINE {
    return avx512::chunk_words<Bits>(w, walk.k_count, at.panel, at.k);
  };
  Walk::Position at = {walk.begin, walk.begin, 0};
  while (at.panel < walk.end) {
    const auto following = walk.after(at);
    const uint32_t* words = words_at(at);
    // A panel alone is one stream of memory. Of several, whose turns take longer, the next chunk is fetched.
    expand(words, walk.sharing == 1 ? words + kPrefetchBytes / 4 : words_at(following), at, expanded);
    multiply(at, expanded);
    if (walk.ends_sharing(at)) store(at.first, walk.last(at.first));
    at = following;
  }
}

// What a range of panels is worked on with: room for an expanded chunk and for the sums of the panels that share one.
template <class Sum>
struct PanelRoom {
  Walk walk;
  int64_t panel_sums;
  uint32_t* expanded;
  Sum* sums;
  TileState state;

  PanelRoom(Scratch& scratch, const PackedTokens& packed, int64_t step, int64_t sharing, int64_t k, int64_t begin,
            int64_t end)
      : walk{begin, end, std::min(sharing, end - begin), k, packed.chunk},
        panel_sums(packed.tiles.tokens() * layout::kPanelRows),
        state(packed.tiles.rows) {
    const int64_t room = packed.chunk / step * kStepWords;
    expanded = scratch.get<uint32_t>(room + sums_count());
    sums = reinterpret_cast<Sum*>(expanded + room);
  }
  int64_t sums_count() const { return walk.sharing * panel_sums; }
  Sum* of(const Walk::Position& at) const { return sums + (at.panel - at.first) * panel_sums; }
};

// multiply.operator()<TwoTiles>(tokens, sums) for every block of the tokens in a chunk that comes after `before` steps.
template <class Sum, class Multiply>
SLIDERQUANT_INLINE inline void for_blocks(const PackedTokens& packed, const std::byte* x, int64_t before, int64_t steps,
                                          Sum* sums, const Multiply& multiply) {
  const TokenTiles& tiles = packed.tiles;
  for (int64_t block = 0; block < tiles.blocks(); ++block) {
    const std::byte* tokens = x + packed.block(before, steps, block);
    Sum* into = sums + 2 * block * tiles.rows * layout::kPanelRows;
    if (2 * block + 1 < tiles.count) {
      multiply.template operator()<true>(tokens, into);
    } else {
      multiply.template operator()<false>(tokens, into);
    }
  }
}

// Into L2: L1 is full of what is expanded.
template <int64_t Words>
SLIDERQUANT_INLINE inline void prefetch_words(const uint32_t* words) {
  unroll<Words / 16>([&]<int I>() SLIDERQUANT_INLINE { _mm_prefetch(words + 16 * I, _MM_HINT_T1); });
}

}  // namespace sliderquant::cpu::amx
