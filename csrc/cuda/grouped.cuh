// Products with several weights: the kernels for tensor cores, whose blocks find out for themselves which expert and which
// of its tokens are theirs.
//
// Only the device knows where the tokens of each expert begin. So there are as many blocks as any spread of the tokens
// could need, slot by slot of kTokens tokens; every warp adds up the tiles of the experts before its slot. Blocks beyond
// the last tile write the zeros of rows that meet no expert. The launch is the same whatever the offsets are, and can be
// captured in a CUDA graph.
//
// What belongs to an expert's tokens is made as if that product stood alone, to the bit.
#pragma once

#include "../experts.h"
#include "../layout.h"
#include "grouped_plan.h"
#include "sm80_integer.cuh"
#include "sm80_wna16.cuh"

namespace sliderquant::cuda {

template <class Gemm>
struct GroupedGemm {
  Gemm gemm;
  Experts experts;
};

// An expert, its tokens [begin, begin + count), and a tile of them; no tokens where the slot is beyond all tiles.
struct GroupedShare {
  int expert, begin, count, tile;
};

// Where the tokens of expert e begin. Whatever the offsets say, nothing beyond the m tokens is touched.
SLIDERQUANT_DEVICE int first_token(const Experts& experts, int e, int m) {
  const int offset = ptx::load(experts.offsets + e);
  return offset < 0 ? 0 : offset > m ? m : offset;
}

// Of tiles of kTokens tokens; all lanes of a warp call it and get the same. Where the slot is beyond all tiles, `tile`
// says by how many, and begin where the tokens that meet no expert begin.
template <int kTokens>
SLIDERQUANT_DEVICE GroupedShare grouped_share(const Experts& experts, int m, int slot, int lane) {
  const int count = static_cast<int>(experts.count);
#pragma unroll 1
  for (int first = 0; first < count; first += kWarp) {
    const int e = first + lane;
    const int begin = e < count ? first_token(experts, e, m) : m;
    const int end = e < count ? first_token(experts, e + 1, m) : m;
    const int tokens = end > begin ? end - begin : 0;
    int tiles = (tokens + kTokens - 1) / kTokens;  // of this lane's expert and those before it
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = ptx::shuffle(tiles, (lane - step) & (kWarp - 1));
      if (lane >= step) tiles += before;
    }
    const int all = ptx::shuffle(tiles, kWarp - 1);
    if (slot < all) {
      int passed = tiles <= slot ? 1 : 0;  // experts whose tiles end before the slot
#pragma unroll
      for (int mask = 1; mask < kWarp; mask *= 2) passed += ptx::shuffle_xor(passed, mask);
      const int before = ptx::shuffle(tiles, (passed - 1) & (kWarp - 1));
      return {first + passed, ptx::shuffle(begin, passed), ptx::shuffle(tokens, passed),
              slot - (passed > 0 ? before : 0)};
    }
    slot -= all;
  }
  return {0, first_token(experts, count, m), 0, slot};
}

template <class Gemm>
SLIDERQUANT_DEVICE Gemm of_expert(const Gemm& a, int expert, int begin, int count) {
  return of_weight(of_tokens(a, begin, count), expert, layout::gpu::packed_words(a.bits, a.n, a.k));
}

// The sums of blocks that share K, of the tokens from `begin` on: as if the expert's product stood alone.
template <class Gemm, class Sum>
SLIDERQUANT_DEVICE Splits<Sum> of_expert(const Gemm& a, const Splits<Sum>& blocks, int begin) {
  return {blocks.splits, blocks.splits > 1 ? blocks.partial + blocks.splits * begin * a.n : nullptr};
}

SLIDERQUANT_DEVICE void store_zero(const Wna16& a, int64_t at) { ptx::store(a.y + at, uint16_t{0}); }
SLIDERQUANT_DEVICE void store_zero(const IntegerGemm& a, int64_t at) { store_output(a, at, 0); }

// Kernel is one of sm80_*.cuh.
template <class Kernel, class Gemm, class Blocks>
struct GroupedKernel {
  static constexpr int kThreads = Kernel::kThreads;
  static constexpr int kMinBlocks = Kernel::kMinBlocks;
  using Args = GroupedGemm<Gemm>;

  // What a block works on, where every thread finds it: in registers there is no room for it.
  struct Own {
    Gemm gemm;
    Blocks blocks;
  };
  static constexpr int kSharedBytes = Kernel::kSharedBytes + static_cast<int>(sizeof(Own));
  static_assert(Kernel::kSharedBytes % alignof(Own) == 0, "it stands behind what the kernel itself uses");
  static_assert(kSharedBytes <= 99 << 10, "a block must fit into the shared memory of sm_89");

  SLIDERQUANT_HOST_DEVICE static int64_t slots(const Args& a) {
    return grouped_slots(a.gemm.m, a.experts.count, Kernel::kTokens);
  }
  static int64_t blocks(const Args& a, int splits) { return Kernel::kTile.n_tiles(a.gemm.n) * splits * slots(a); }

  // Blocks of the same weights follow each other.
  SLIDERQUANT_DEVICE static void run(const Args& a, const Blocks& blocks, int64_t block, int thread, char* shared) {
    const int each = static_cast<int>(slots(a)), slot = static_cast<int>(block) % each;
    const int number = static_cast<int>(block) / each;  // of the channels and the share of K
    const int m = static_cast<int>(a.gemm.m);
    const GroupedShare share = grouped_share<Kernel::kTokens>(a.experts, m, slot, thread % kWarp);
    if (share.count == 0) {
      if (number % blocks.splits == 0) zero_rest(a.gemm, share, slot, each, number / blocks.splits, thread);
      return;
    }
    auto* own = reinterpret_cast<Own*>(shared + Kernel::kSharedBytes);
    if (thread == 0) {
      own->gemm = of_expert(a.gemm, share.expert, share.begin, share.count);
      own->blocks = of_expert(a.gemm, blocks, share.begin);
    }
    ptx::sync_threads();
    const int tiles = (share.count + Kernel::kTokens - 1) / Kernel::kTokens;
    Kernel::run(own->gemm, own->blocks, number * tiles + share.tile, thread, shared);
  }

 private:
  // The slots beyond all tiles share out the rows that meet no expert.
  SLIDERQUANT_DEVICE static void zero_rest(const Gemm& a, const GroupedShare& share, int slot, int slots, int n_tile,
                                           int thread) {
    const int beyond = slots - (slot - share.tile);
#pragma unroll 1
    for (int64_t m = share.begin + share.tile; m < a.m; m += beyond) {
#pragma unroll 1
      for (int row = thread; row < Kernel::kRows; row += kThreads) {
        const int64_t n = static_cast<int64_t>(n_tile) * Kernel::kRows + row;
        if (n < a.n) store_zero(a, m * a.n + n);
      }
    }
  }
};

// Reduce is that of Kernel.
template <class Reduce, class Gemm, class Blocks>
struct GroupedReduce {
  static constexpr int kThreads = Reduce::kThreads;
  using Args = GroupedGemm<Gemm>;

  static int64_t blocks(const Args& a) { return Reduce::blocks(a.gemm); }

  SLIDERQUANT_DEVICE static void run(const Args& a, const Blocks& blocks, int64_t block, int thread) {
    const int64_t at = block * kThreads + thread;
    const int token = static_cast<int>(at / a.gemm.n), m = static_cast<int>(a.gemm.m);
    const int count = static_cast<int>(a.experts.count);
    if (token >= first_token(a.experts, count, m)) return;
    int expert = 0;  // the last one that begins no later than the token
    for (int end = count; end - expert > 1;) {
      const int middle = (expert + end) / 2;
      (first_token(a.experts, middle, m) <= token ? expert : end) = middle;
    }
    const int begin = first_token(a.experts, expert, m), tokens = first_token(a.experts, expert + 1, m) - begin;
    const int64_t within = at - begin * a.gemm.n;
    Reduce::run(of_expert(a.gemm, expert, begin, tokens), of_expert(a.gemm, blocks, begin), within / kThreads,
                static_cast<int>(within % kThreads));
  }
};

}  // namespace sliderquant::cuda
