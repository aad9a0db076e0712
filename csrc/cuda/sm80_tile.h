// What one block of threads of the kernels for tensor cores takes on, by the bits of a code and the tokens: sizes that
// the kernels are built with and that dispatch.h weighs.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace sliderquant::cuda {

// Of sm80_wna16.cuh.
struct Sm80Tile {
  static constexpr int kWarps = 8;
  static constexpr int kPanels = 2;  // of 16 channels, per warp
  static constexpr int kTileTokens = 8;
  static constexpr int kSharedBudget = 96 << 10;  // sm_89 and sm_120 give a block 99 KB

  int bits, tiles;

  SLIDERQUANT_HOST_DEVICE constexpr int tokens() const { return kTileTokens * tiles; }
  // Warps that share the K of the same channels. With many tokens x takes most of the room, and one chunk of it at a
  // time serves all warps.
  SLIDERQUANT_HOST_DEVICE constexpr int warps_k() const { return tiles <= 2 ? 2 : 1; }
  SLIDERQUANT_HOST_DEVICE constexpr int rows() const {
    return kWarps / warps_k() * kPanels * layout::gpu::kPanelRows;
  }
  // Blocks that share an SM, and its registers.
  SLIDERQUANT_HOST_DEVICE constexpr int blocks_per_processor() const { return tiles <= 2 ? 2 : 1; }

  // A stage: so many chunks of 128 k for each of the warps that share K. Chunks of 2 bits are small, and what a stage
  // costs beside them weighs more.
  SLIDERQUANT_HOST_DEVICE constexpr int chunks() const { return bits == 2 && tiles <= 2 ? 2 : 1; }
  SLIDERQUANT_HOST_DEVICE constexpr int stage_chunks() const { return chunks() * warps_k(); }
  SLIDERQUANT_HOST_DEVICE constexpr int weight_bytes() const {
    return kWarps * chunks() * kPanels * 4 * layout::gpu::chunk_words(bits);
  }
  SLIDERQUANT_HOST_DEVICE constexpr int x_bytes() const {
    return stage_chunks() * tokens() * 2 * layout::gpu::kChunkCodes;
  }
  SLIDERQUANT_HOST_DEVICE constexpr int stage_bytes() const { return weight_bytes() + x_bytes(); }
  SLIDERQUANT_HOST_DEVICE constexpr int stages() const {
    return kSharedBudget / stage_bytes() < 6 ? kSharedBudget / stage_bytes() : 6;
  }
  // In bytes that memory delivers in the same time: those of a stage, or its products, 31 bytes each on an H200 by the
  // model of benchmarks/gpu_model.py.
  SLIDERQUANT_HOST_DEVICE constexpr int stage_cost() const {
    const int products = kWarps * chunks() * kPanels * (layout::gpu::kChunkCodes / 16) * tiles;
    return stage_bytes() > 31 * products ? stage_bytes() : 31 * products;
  }

  // Sums of the warps, in fp32, after the last stage; four channels apart, so that a warp writes to different banks.
  SLIDERQUANT_HOST_DEVICE constexpr int sum_stride() const { return rows() + 4; }
  SLIDERQUANT_HOST_DEVICE constexpr int shared_bytes() const {
    const int sums = warps_k() * tokens() * sum_stride() * 4;
    return stages() * stage_bytes() > sums ? stages() * stage_bytes() : sums;
  }

  // How often a matrix is cut along each of its sizes.
  SLIDERQUANT_HOST_DEVICE constexpr int64_t n_tiles(int64_t n) const { return (n + rows() - 1) / rows(); }
  SLIDERQUANT_HOST_DEVICE constexpr int64_t m_tiles(int64_t m) const { return (m + tokens() - 1) / tokens(); }
  SLIDERQUANT_HOST_DEVICE constexpr int64_t k_stages(int64_t k) const {
    return (layout::gpu::chunks(k) + stage_chunks() - 1) / stage_chunks();
  }
};

// Of sm80_integer.cuh.
struct Sm80IntegerTile {
  static constexpr int kWarps = 8;
  static constexpr int kTileTokens = 8;
  static constexpr int kSharedBudget = 96 << 10;
  static constexpr int kRowBytes = layout::gpu::kChunkCodes;  // of one token in a chunk
  static constexpr int kFew = 64;  // tokens of a block up to which every warp has channels of its own

  int bits, block_tokens;

  SLIDERQUANT_HOST_DEVICE constexpr int tokens() const { return block_tokens; }
  // Warps that share the K of the same outputs, that stand side by side along the tokens, and along the channels. With
  // few tokens a block is kept small: there are more of them, and two share an SM.
  SLIDERQUANT_HOST_DEVICE constexpr int warps_k() const { return block_tokens <= 16 ? 2 : 1; }
  SLIDERQUANT_HOST_DEVICE constexpr int warps_m() const { return block_tokens > kFew ? 2 : 1; }
  SLIDERQUANT_HOST_DEVICE constexpr int warps_n() const { return kWarps / warps_k() / warps_m(); }
  // Of 16 channels, and tiles of eight tokens, per warp. A warp of 64 x 64 outputs reads three quarters of a word per
  // lane and product, one of 32 x 64 five quarters.
  SLIDERQUANT_HOST_DEVICE constexpr int panels() const { return block_tokens > kFew ? 4 : 2; }
  SLIDERQUANT_HOST_DEVICE constexpr int tiles() const { return block_tokens / kTileTokens / warps_m(); }
  SLIDERQUANT_HOST_DEVICE constexpr int rows() const { return warps_n() * panels() * layout::gpu::kPanelRows; }
  // Blocks that share an SM, and its registers.
  SLIDERQUANT_HOST_DEVICE constexpr int blocks_per_processor() const { return block_tokens > kFew ? 1 : 2; }

  // A stage: so many chunks of 128 k for each of the warps that share K.
  SLIDERQUANT_HOST_DEVICE constexpr int chunks() const { return bits == 2 && block_tokens <= 16 ? 2 : 1; }
  SLIDERQUANT_HOST_DEVICE constexpr int stage_chunks() const { return chunks() * warps_k(); }
  SLIDERQUANT_HOST_DEVICE constexpr int stage_panels() const {
    return rows() / layout::gpu::kPanelRows * stage_chunks();
  }
  SLIDERQUANT_HOST_DEVICE constexpr int weight_bytes() const {
    return stage_panels() * 4 * layout::gpu::chunk_words(bits);
  }
  SLIDERQUANT_HOST_DEVICE constexpr int x_bytes() const { return stage_chunks() * tokens() * kRowBytes; }
  SLIDERQUANT_HOST_DEVICE constexpr int stage_bytes() const { return weight_bytes() + x_bytes(); }
  SLIDERQUANT_HOST_DEVICE constexpr int stages() const {
    return kSharedBudget / stage_bytes() < 6 ? kSharedBudget / stage_bytes() : 6;
  }
  // In bytes that memory delivers in the same time: those of a stage, or its products, 31 bytes each on an H200 by the
  // model of benchmarks/gpu_model.py.
  SLIDERQUANT_HOST_DEVICE constexpr int stage_cost() const {
    constexpr int kBlocks = layout::gpu::kChunkCodes / layout::kBlockCodes;
    const int products = stage_panels() * kBlocks * (block_tokens / kTileTokens);
    return stage_bytes() > 31 * products ? stage_bytes() : 31 * products;
  }

  // After the last stage, the sums of the warps: of as many tokens at a time as there is room for; four channels apart,
  // so that a warp writes to different banks.
  SLIDERQUANT_HOST_DEVICE constexpr int sum_stride() const { return rows() + 4; }
  SLIDERQUANT_HOST_DEVICE constexpr int passes() const { return block_tokens > kFew ? 2 : 1; }
  SLIDERQUANT_HOST_DEVICE constexpr int shared_bytes() const {
    const int sums = warps_k() * tokens() / passes() * sum_stride() * 4;
    return stages() * stage_bytes() > sums ? stages() * stage_bytes() : sums;
  }

  // How often a matrix is cut along each of its sizes.
  SLIDERQUANT_HOST_DEVICE constexpr int64_t n_tiles(int64_t n) const { return (n + rows() - 1) / rows(); }
  SLIDERQUANT_HOST_DEVICE constexpr int64_t m_tiles(int64_t m) const { return (m + tokens() - 1) / tokens(); }
  SLIDERQUANT_HOST_DEVICE constexpr int64_t k_stages(int64_t k) const {
    return (layout::gpu::chunks(k) + stage_chunks() - 1) / stage_chunks();
  }
};

}  // namespace sliderquant::cuda
