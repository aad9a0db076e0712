// What one block of threads of the sm90_* kernels takes on, the order in which blocks take it, and what these kernels
// keep in a workspace: sizes that the kernels are built with and that dispatch.h weighs.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace sliderquant::cuda {

struct Sm90Tile {
  static constexpr int kConsumers = 8;  // warps, two warpgroups; of a third one, which gives up registers, one copies
  static constexpr int kThreads = 3 * 128;
  static constexpr int kParts = 2;      // of 64 channels, per warpgroup
  static constexpr int kCluster = 2;    // blocks side by side along the channels, which fetch their tokens once
  static constexpr int kRows = kConsumers * kParts * layout::gpu::kPanelRows;
  static constexpr int kPanels = kRows / layout::gpu::kPanelRows;
  static constexpr int kRowBytes = 128;  // of a token in a column of the image
  static constexpr int kSharedBudget = 224 << 10;
  static constexpr int kMaxStages = 8;
  static constexpr int kLeastTokens = 64, kMostTokens = 128, kTokenStep = 32;  // of a block
  static constexpr int kBarrierBytes = 8;

  int bits, block_tokens;
  int element_bytes;  // of x: 2, or 1 for codes

  SLIDERQUANT_HOST_DEVICE constexpr int tokens() const { return block_tokens; }
  SLIDERQUANT_HOST_DEVICE constexpr int rows() const { return kRows; }
  SLIDERQUANT_HOST_DEVICE constexpr int blocks_per_processor() const { return 1; }

  // A stage is one chunk of 128 k.
  SLIDERQUANT_HOST_DEVICE constexpr int stage_chunks() const { return 1; }
  SLIDERQUANT_HOST_DEVICE constexpr int panel_bytes() const { return 4 * layout::gpu::chunk_words(bits); }
  SLIDERQUANT_HOST_DEVICE constexpr int weight_bytes() const { return kPanels * panel_bytes(); }
  // Of the image, that a chunk is made of.
  SLIDERQUANT_HOST_DEVICE constexpr int columns() const {
    return layout::gpu::kChunkCodes * element_bytes / kRowBytes;
  }
  SLIDERQUANT_HOST_DEVICE constexpr int column_bytes() const { return tokens() * kRowBytes; }
  SLIDERQUANT_HOST_DEVICE constexpr int x_bytes() const { return columns() * column_bytes(); }
  SLIDERQUANT_HOST_DEVICE constexpr int stage_bytes() const { return weight_bytes() + x_bytes(); }
  SLIDERQUANT_HOST_DEVICE constexpr int stages() const {
    return kSharedBudget / stage_bytes() < kMaxStages ? kSharedBudget / stage_bytes() : kMaxStages;
  }
  // Of a stage, that a block fetches itself.
  SLIDERQUANT_HOST_DEVICE constexpr int fetched_bytes() const { return weight_bytes() + x_bytes() / kCluster; }
  // Of the tensor cores of an SM for a stage, at the data sheet's rate: 2048 products of 16 bits each, or twice as many
  // of bytes.
  SLIDERQUANT_HOST_DEVICE constexpr int stage_cycles() const {
    return kRows * tokens() * layout::gpu::kChunkCodes / (2048 * 2 / element_bytes);
  }

  // The stages, and behind them two barriers for each.
  SLIDERQUANT_HOST_DEVICE constexpr int shared_bytes() const {
    return stages() * (stage_bytes() + 2 * kBarrierBytes);
  }

  // How often a matrix is cut along each of its sizes.
  SLIDERQUANT_HOST_DEVICE constexpr int64_t n_tiles(int64_t n) const { return n_clusters(n) * kCluster; }
  SLIDERQUANT_HOST_DEVICE constexpr int64_t m_tiles(int64_t m) const { return (m + tokens() - 1) / tokens(); }
  SLIDERQUANT_HOST_DEVICE constexpr int64_t k_stages(int64_t k) const { return layout::gpu::chunks(k); }
  SLIDERQUANT_HOST_DEVICE constexpr int64_t n_clusters(int64_t n) const {
    return (n + kCluster * kRows - 1) / (kCluster * kRows);
  }
  // Shares of the work, of which every cluster takes one at a time.
  SLIDERQUANT_HOST_DEVICE constexpr int64_t works(int64_t m, int64_t n, int splits) const {
    return n_clusters(n) * m_tiles(m) * splits;
  }
};

// One block's part of a share of the work: a tile of outputs, over a part of K.
struct Sm90Work {
  int m0, n0, split, chunk0, chunks;
};

// Shares that run at the same time have tokens and weights in common, which L2 then holds: kGroup tiles of tokens meet
// all channels before the next ones do.
SLIDERQUANT_HOST_DEVICE constexpr Sm90Work sm90_work(const Sm90Tile& tile, int64_t m, int64_t n, int64_t k, int splits,
                                                     int index, int rank) {
  constexpr int kGroup = 12;
  const int m_tiles = static_cast<int>(tile.m_tiles(m)), columns = static_cast<int>(tile.n_clusters(n)) * splits;
  const int group = index / (kGroup * columns), within = index % (kGroup * columns);
  const int left = m_tiles - group * kGroup, size = left < kGroup ? left : kGroup;
  const int column = within / size, chunks = static_cast<int>(layout::gpu::chunks(k)), split = column % splits;
  const int begin = chunks * split / splits, end = chunks * (split + 1) / splits;
  const int m0 = (group * kGroup + within % size) * tile.tokens();
  return {m0, (column / splits * Sm90Tile::kCluster + rank) * tile.rows(), split, begin, end - begin};
}

// The tokens as the kernels take them. Columns of 128 bytes of K (64 or 128 k), each with all tokens, eight tokens of a
// column in an atom of 1 KB, which is swizzled. Of the 32 k of a block, the 4-byte words are permuted so that they meet
// the k that a lane owns of the weights (layout.h): position p of a product's A stands for k that the lane holds there.
namespace image {

constexpr int kRowBytes = Sm90Tile::kRowBytes;
constexpr int kAtomRows = 8;

SLIDERQUANT_HOST_DEVICE constexpr int64_t padded_m(int64_t m) { return (m + kAtomRows - 1) / kAtomRows * kAtomRows; }

SLIDERQUANT_HOST_DEVICE constexpr int64_t bytes(int element_bytes, int64_t m, int64_t k) {
  return padded_m(m) * layout::gpu::chunks(k) * layout::gpu::kChunkCodes * element_bytes;
}

// Where 4-byte word w of the 32 k of a block stands among them.
SLIDERQUANT_HOST_DEVICE constexpr int word_place(int element_bytes, int w) {
  return element_bytes == 2 ? w % 4 * 4 + w / 4 : w % 2 * 4 + w / 2;
}

// Where a 16-byte unit of a token's column stands.
SLIDERQUANT_HOST_DEVICE constexpr int64_t unit_place(int64_t m_padded, int64_t m, int64_t column, int unit) {
  return (column * m_padded + m) * kRowBytes + ((unit ^ static_cast<int>(m % kAtomRows)) << 4);
}

}  // namespace image

// What follows each other in the workspace: the image, the magnitudes of the channels where they are wanted, and the
// sums of the blocks that share K. In 32-bit elements.
struct Sm90Workspace {
  int64_t image, magnitudes, partial;

  constexpr int64_t arranged() const { return image + magnitudes; }
  constexpr int64_t size() const { return arranged() + partial; }
};

constexpr Sm90Workspace sm90_workspace(int element_bytes, bool magnitudes, int64_t m, int64_t n, int64_t k,
                                       int splits) {
  return {image::bytes(element_bytes, m, k) / 4, magnitudes ? n : 0, splits > 1 ? splits * m * n : 0};
}

}  // namespace sliderquant::cuda
