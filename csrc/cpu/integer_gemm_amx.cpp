// Integer GEMM (W4A4 and every other pair of widths up to 8) for AMX.
//
// Index names: n output channel, panel 32 of them, m token, tile up to 16 of them, block two tiles, k input channel,
// step 64 of them.
//
// tdpbusd multiplies unsigned activation codes with signed weight codes and adds exactly, like vpdpbusd.
#include <algorithm>
#include <cstring>

#include "amx.h"
#include "api.h"
#include "expand_quads.h"
#include "integer_epilogue.h"

namespace sliderquant::cpu::amx {
namespace {

using namespace avx512;

constexpr int64_t kStep = kRowBytes;  // input channels

// Input channels per expansion. Few tokens wait for what is expanded, which must still be in L1; for many of them fewer
// chunks mean that their sums enter and leave the registers less often. Measured.
inline int64_t chunk_for(const TokenTiles& tiles) { return tiles.blocks() == 1 ? 256 : 512; }
static_assert(kStep % layout::kBlockCodes == 0, "a step must be whole periods of every width");

// Of a last half step the other half is whatever was there: it meets codes of tokens that are zero.
template <int Bits>
void expand_chunk(const uint32_t* words, const uint32_t* ahead, int64_t chunk, uint32_t* expanded) {
  constexpr int64_t kWords = layout::row_words(Bits, kStep) * layout::kPanelRows;
  for (int64_t k = 0; k < chunk; k += kStep) {
    prefetch_words<kWords>(ahead);
    expand_quads<Bits>(words, std::min(chunk - k, kStep), expanded);
    words += kWords;
    ahead += kWords;
    expanded += kStepWords;
  }
}

template <int Bits>
void panels(const IntegerGemm& a, const PackedTokens& packed, const std::byte* codes, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const bool resident = packed.tiles.blocks() == 1;  // its sums stay in registers from chunk to chunk of a panel
  const PanelRoom<int32_t> room(scratch, packed, kStep, resident ? 1 : kSharingPanels, a.k, begin, end);
  walk_chunks<Bits>(
      room.walk, a.w, room.expanded,
      [&](const uint32_t* words, const uint32_t* ahead, const auto& at, uint32_t* into) SLIDERQUANT_INLINE {
        expand_chunk<Bits>(words, ahead, room.walk.chunk_at(at.k), into);
      },
      [&](const auto& at, const uint32_t* weights) SLIDERQUANT_INLINE {
        const int64_t steps = (room.walk.chunk_at(at.k) + kStep - 1) / kStep;
        const Passage passage = {at.k == 0, at.k > 0 && !resident, !resident || at.k + packed.chunk >= a.k};
        for_blocks(packed, codes, at.k / kStep, steps, room.of(at),
                   [&]<bool Two>(const std::byte* tokens, int32_t* into) SLIDERQUANT_INLINE {
                     add_tiles<DotInt8, 1, Two>(tokens, weights, steps, packed.tiles.rows, passage, into);
                   });
      },
      [&](int64_t first, int64_t last) { store_panels(a, first, last, room.panel_sums, room.sums); });
}

// Packs the codes of a tile of tokens where PackedTokens has them.
void pack_tile(const IntegerGemm& a, const PackedTokens& packed, int64_t tile, std::byte* codes) {
  for (int64_t row = 0; row < packed.tiles.rows; ++row) {
    const int64_t m = tile * packed.tiles.rows + row;
    const uint8_t* from = a.codes + m * a.k;
    for (int64_t k0 = 0; k0 < a.k; k0 += packed.chunk) {
      const int64_t chunk = std::min(packed.chunk, a.k - k0), steps = (chunk + kStep - 1) / kStep;
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t left = m < a.m ? chunk - step * kStep : 0;
        const __mmask64 mask = left >= kStep ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
        _mm512_store_si512(codes + packed.tile(k0 / kStep, steps, step, tile, 0) + row * kRowBytes,
                           _mm512_maskz_loadu_epi8(mask, from + k0 + step * kStep));
      }
    }
  }
}

// The panels given, for up to kSuperTokens tokens.
void super_block(const IntegerGemm& a, Panels of, Parallel parallel) {
  thread_local Scratch pack;
  const TokenTiles tiles(a.m);
  const PackedTokens packed = {tiles, 1, chunk_for(tiles)};
  std::byte* codes = pack.get<std::byte>(packed.bytes((a.k + kStep - 1) / kStep));
  parallel_for(parallel, packed.tiles.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) pack_tile(a, packed, tile, codes);
  });
  const auto run = layout::with_bits(a.bits, [](auto bits) { return panels<bits>; });
  parallel_for(parallel, of.end - of.begin, panel_grain(a.m, a.k),
               [&](int64_t begin, int64_t end) { run(a, packed, codes, of.begin + begin, of.begin + end); });
}

}  // namespace

void integer_gemm(const IntegerGemm& a, Panels of, Parallel parallel) {
  for_super_tokens(a, [&](const IntegerGemm& part) { super_block(part, of, parallel); });
}

}  // namespace sliderquant::cpu::amx
