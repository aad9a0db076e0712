// What the kernels for tensor cores have in common: which part of a product a block makes, copies in
// flight, and the sums of blocks that share K.
#pragma once

#include "../layout.h"
#include "ptx.cuh"

namespace sliderquant::cuda {

// A block's first token and channel, and its share of K: stages of kTile.stage_chunks() chunks from chunk0 on.
struct BlockShare {
  int m0, n0, split, stages, chunk0;
  int chunks;        // of the whole K
  bool reads_alone;  // its weights: no other block has tokens for them
};

// How many blocks share the K of the same outputs, and where their sums meet.
template <class Sum>
struct Splits {
  int splits;
  Sum* partial;  // [splits, m, n], null for one split
};

// Of one of the `size` outputs, in the order of K.
template <class Sum>
SLIDERQUANT_DEVICE Sum sum_of_splits(const Splits<Sum>& blocks, int64_t size, int64_t at) {
  Sum sum = 0;
#pragma unroll 4
  for (int split = 0; split < blocks.splits; ++split) sum += ptx::load_once(blocks.partial + split * size + at);
  return sum;
}

// Blocks of the same weights follow each other, so that L2 serves all but the first.
template <class Kernel>
SLIDERQUANT_DEVICE BlockShare block_share(int64_t m, int64_t k, int splits, int64_t block) {
  constexpr auto tile = Kernel::kTile;
  const int m_tiles = static_cast<int>(tile.m_tiles(m)), number = static_cast<int>(block) / m_tiles;
  const int stages = static_cast<int>(tile.k_stages(k)), split = number % splits;
  const int begin = stages * split / splits, end = stages * (split + 1) / splits;
  return {static_cast<int>(block) % m_tiles * tile.tokens(),
          number / splits * tile.rows(),
          split,
          end - begin,
          begin * tile.stage_chunks(),
          static_cast<int>(layout::gpu::chunks(k)),
          m_tiles == 1};
}

// copy(slot) starts the copies of the next stage, to shared memory from `slot` on, and compute(slot) makes use of what
// came there. Shared memory is free again at the end.
template <int kStages, int kStageBytes, class Copy, class Compute>
SLIDERQUANT_DEVICE void run_stages(int stages, const Copy& copy, const Compute& compute) {
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < stages) copy(stage * kStageBytes);
    ptx::cp_async_commit();
  }
  int slot = 0;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    ptx::cp_async_wait<kStages - 2>();
    // Also: all warps have left the slot that the next copies fill.
    ptx::sync_threads();
    if (stage + kStages - 1 < stages) copy(slot == 0 ? (kStages - 1) * kStageBytes : slot - kStageBytes);
    ptx::cp_async_commit();
    compute(slot);
    slot = slot == (kStages - 1) * kStageBytes ? 0 : slot + kStageBytes;
  }
  ptx::cp_async_wait<0>();
  ptx::sync_threads();
}

}  // namespace sliderquant::cuda
