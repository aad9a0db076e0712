// W*A16 for few tokens on tensor cores, from sm_80 on: y = x @ ((code - zero) * scale).T + bias.
//
// A block of eight warps makes kRows output channels for kTokens tokens, over its share of K. A warp owns two panels of
// 16 channels, the rows of mma.m16n8k16, and all tokens, eight per tile: what it reads of x serves 32 channels, and no
// other warp reads its weights. The kWarpsK warps of the same channels take every kWarpsK-th chunk of 128 k. A stage,
// kChunks chunks per such warp, reaches shared memory by asynchronous copies, kStages - 1 of them in flight. Blocks may
// share K too; a second kernel then adds up their sums (a counter for the last block to do so would have to be zeroed
// first, which is a launch as well).
//
// Numerics: code - zero is exact in 16 bits (expand.cuh), products are exact, and their sums within a group are fp32.
// They are scaled and added up in fp32 where the group ends, so scales are never rounded. One channel-wide group is
// added up every chunk in the same way. Partial sums of the warps and of the blocks that share K are added in a fixed
// order: results repeat bit by bit.
//
// Index names: w weights, x tokens; _gl in global memory, _sh in shared memory, _rd read there, _wr written there;
// b block of 32 k within a chunk, r panel of the warp, h half of its rows, j tile of tokens.
#pragma once

#include "../args.h"
#include "../layout.h"
#include "expand.cuh"
#include "ptx.cuh"
#include "sm80_stages.cuh"
#include "sm80_tile.h"

namespace sliderquant::cuda {

using Wna16Blocks = Splits<float>;

template <int kBits, Float kType, int kTiles>
class Sm80Wna16 {
 public:
  static constexpr Sm80Tile kTile = {kBits, kTiles};
  static constexpr int kThreads = Sm80Tile::kWarps * kWarp;
  static constexpr int kTokens = kTile.tokens();
  static constexpr int kWarpsK = kTile.warps_k();
  static constexpr int kWarpsN = Sm80Tile::kWarps / kWarpsK;
  static constexpr int kPanels = Sm80Tile::kPanels;
  static constexpr int kRows = kTile.rows();
  static constexpr int kChunks = kTile.chunks();
  static constexpr int kMinBlocks = kTile.blocks_per_processor();
  static constexpr int kStages = kTile.stages();
  static constexpr int kStageBytes = kTile.stage_bytes();
  static constexpr int kSumStride = kTile.sum_stride();
  static constexpr int kSharedBytes = kTile.shared_bytes();
  static constexpr int kPanelBytes = 4 * layout::gpu::chunk_words(kBits);  // of a chunk
  static constexpr int kWarpBytes = kPanels * kPanelBytes;

  static_assert(Sm80Tile::kTileTokens == fragment::kColumns, "a tile must be the columns of one tensor-core product");
  static_assert(layout::gpu::kPanelRows == fragment::kRows, "a panel must be the rows of one tensor-core product");
  static_assert(layout::kBlockCodes == 2 * fragment::depth(16), "a block of k must be two tensor-core products");
  static_assert(kPanels * layout::gpu::kPanelRows == kWarp, "each lane of a warp fetches the scale of one channel");
  static_assert(kWarpBytes % (kWarp * 16) == 0, "a warp's weights must be whole copies of all its lanes");
  static_assert(kThreads % (kWarp * kTiles) == 0, "all copies of a thread must be of one token");
  static_assert(kTile.x_bytes() % (kThreads * 16) == 0, "the tokens of a stage must be whole copies of all threads");
  static_assert(kStages >= 2, "copies must be in flight while the warps compute");
  static_assert(kSharedBytes <= 99 << 10, "a block must fit into the shared memory of sm_89");
  static_assert(kWarpsK <= 2, "finish adds up two warps at most");

  static int64_t blocks(const Wna16& a, int splits) { return kTile.n_tiles(a.n) * splits * kTile.m_tiles(a.m); }

  SLIDERQUANT_DEVICE static void run(const Wna16& a, const Wna16Blocks& blocks, int64_t block, int thread,
                                     char* shared) {
    Sm80Wna16 kernel(a, blocks, block, thread, shared);
    kernel.multiply();
    kernel.finish();
  }

 private:
  using Expansion = Expand<kBits, kType>;
  using Offsets = typename Expansion::Offsets;
  static constexpr uint32_t kSymmetric = (1u << (kBits - 1)) * 0x10001u;
  static constexpr int kRowsHeld = 2 * kPanels;  // of a lane: g and g + 8 of each panel

  SLIDERQUANT_DEVICE Sm80Wna16(const Wna16& a, const Wna16Blocks& blocks, int64_t block, int thread, char* shared)
      : a_(a),
        blocks_(blocks),
        shared_(shared),
        thread_(thread),
        lane_(thread % kWarp),
        warp_n_(thread / kWarp % kWarpsN),
        warp_k_(thread / kWarp / kWarpsN) {
    const BlockShare share = block_share<Sm80Wna16>(a.m, a.k, blocks.splits, block);
    const int chunks = share.chunks, chunk0 = share.chunk0;
    m0_ = share.m0;
    n0_ = share.n0;
    split_ = share.split;
    stages_ = share.stages;

    const int panel = n0_ / layout::gpu::kPanelRows + warp_n_ * kPanels;
    panels_ = static_cast<int>(layout::gpu::panels(a.n)) - panel;
    w_chunks_ = chunks - chunk0 - warp_k_;
    const int64_t w_chunk = static_cast<int64_t>(panel) * chunks + chunk0 + warp_k_;
    w_gl_ = reinterpret_cast<const char*>(a.w) + w_chunk * kPanelBytes + 16 * lane_;
    w_next_panel_ = static_cast<int64_t>(chunks) * kPanelBytes;
    w_policy_ = share.reads_alone ? ptx::evict_first() : ptx::evict_normal();

    // The tokens' operand stands in shared memory as the lanes will read it, so that neither side meets bank conflicts:
    // chunk, block, tile, lane. So a thread always copies of the same token, the same run within 32 k.
    const int m = m0_ + fragment::kColumns * (thread / kWarp % kTiles) + lane_ / 4;
    const int k = chunk0 * layout::gpu::kChunkCodes + thread / (kWarp * kTiles) * layout::kBlockCodes +
                  lane_ % 4 * layout::gpu::kLaneCodes;
    x_gl_ = a.x + (m < a.m ? m * a.x_stride + k : 0);
    x_left_ = m < a.m ? static_cast<int>(a.k) - k : 0;
    const auto x_step = static_cast<uintptr_t>(a.m > 1 ? 2 * a.x_stride : 0);
    x_aligned_ = (reinterpret_cast<uintptr_t>(a.x) | x_step) % 16 == 0;

    const int channel = n0_ + warp_n_ * kWarp + lane_;
    const int k0 = (chunk0 + warp_k_) * layout::gpu::kChunkCodes;
    const bool one_group = a.group == a.k;
    group_mask_ = one_group || a.group == 128 ? kChunkBlocks - 1 : a.group == 64 ? 1 : 0;
    scale_at_ = (one_group ? 0 : k0 / static_cast<int>(a.group)) * a.n + channel;
    scale_step_ = one_group ? 0 : kWarpsK * layout::gpu::kChunkCodes / static_cast<int>(a.group) * a.n;
    scale_left_ = channel < a.n ? static_cast<int>(a.k) - k0 : 0;
  }

  SLIDERQUANT_DEVICE void multiply() {
    fetch_scales();
    const auto compute_stage = [this](int slot) {
#pragma unroll 1
      for (int i = 0; i < kChunks; ++i) compute(slot, i);
    };
    run_stages<kStages, kStageBytes>(stages_, [this](int slot) { copy_stage(slot); }, compute_stage);
  }

  // Where the weights of this warp's chunk i begin, and the tokens of that chunk.
  SLIDERQUANT_DEVICE char* w_sh(int slot, int i) const {
    return shared_ + slot + ((warp_k_ * kWarpsN + warp_n_) * kChunks + i) * kWarpBytes;
  }
  SLIDERQUANT_DEVICE const char* x_sh(int slot, int i) const {
    return shared_ + slot + kTile.weight_bytes() + (i * kWarpsK + warp_k_) * kChunkBlocks * kTiles * kWarp * 16;
  }

  // Each call copies the next stage.
  SLIDERQUANT_DEVICE void copy_stage(int slot) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (i * kWarpsK >= w_chunks_) continue;
      constexpr int kWhole = kPanelBytes / (16 * kWarp);  // copies of a panel by all lanes
      char* w_sh_wr = w_sh(slot, i) + 16 * lane_;
      const char* w_gl_rd = w_gl_ + i * kWarpsK * kPanelBytes;
#pragma unroll
      for (int r = 0; r < kPanels; ++r) {
        if (r >= panels_) continue;
#pragma unroll
        for (int copy = 0; copy < kWhole; ++copy) {
          ptx::cp_async(w_sh_wr + r * kPanelBytes + 16 * kWarp * copy,
                        w_gl_rd + r * w_next_panel_ + 16 * kWarp * copy, w_policy_);
        }
      }
      if constexpr (kPanelBytes % (16 * kWarp) != 0) {
        // Half a copy is left of each panel: the upper lanes take that of the second one.
        static_assert(kPanelBytes % (16 * kWarp) == 8 * kWarp && kPanels == 2, "two halves of a copy must be left");
        const int r = lane_ / (kWarp / 2), back = 8 * kWarp * r;
        if (r < panels_) {
          ptx::cp_async(w_sh_wr + r * kPanelBytes + 16 * kWarp * kWhole - back,
                        w_gl_rd + r * w_next_panel_ + 16 * kWarp * kWhole - back, w_policy_);
        }
      }
    }
    w_gl_ += kTile.stage_chunks() * kPanelBytes;
    w_chunks_ -= kTile.stage_chunks();

    // Zeros where there is no token or no such k: there the weights are anything.
#pragma unroll
    for (int i = 0; i < kTile.x_bytes() / (16 * kThreads); ++i) {
      constexpr int kStep = kThreads / (kWarp * kTiles) * layout::kBlockCodes;  // k from one copy to the next
      char* x_sh_wr = shared_ + slot + kTile.weight_bytes() + 16 * (i * kThreads + thread_);
      const uint16_t* x_gl_rd = x_gl_ + i * kStep;
      const bool exists = i * kStep < x_left_;
      if (x_aligned_) {
        ptx::cp_async(x_sh_wr, exists ? x_gl_rd : a_.x, exists);
      } else {
        Vec4 run = {};
        if (exists) {
          for (int e = 0; e < layout::gpu::kLaneCodes; ++e) {
            run.v[e / 2] |= static_cast<uint32_t>(ptx::load(x_gl_rd + e)) << 16 * (e % 2);
          }
        }
        *reinterpret_cast<Vec4*>(x_sh_wr) = run;
      }
    }
    x_gl_ += kTile.stage_chunks() * layout::gpu::kChunkCodes;
    x_left_ -= kTile.stage_chunks() * layout::gpu::kChunkCodes;
  }

  // Of this lane's channel, the scale and the zero point of every group of this warp's next chunk. Nothing may touch
  // them before that chunk: it would wait for memory here.
  SLIDERQUANT_DEVICE void fetch_scales() {
    int64_t at = scale_at_;
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      if ((b & group_mask_) != 0) continue;
      const bool exists = b * layout::kBlockCodes < scale_left_;
      next_scale_[b] = exists ? ptx::load(a_.scale + at) : 0;
      next_zero_[b] = exists && a_.zero != nullptr ? ptx::load(a_.zero + at) : 0;
      at += a_.n;
    }
    scale_at_ += scale_step_;
    scale_left_ -= kWarpsK * layout::gpu::kChunkCodes;
  }

  // This warp's chunk i of a stage.
  SLIDERQUANT_DEVICE void compute(int slot, int i) {
    const bool asymmetric = a_.zero != nullptr;
    float scale[kChunkBlocks];
    uint32_t lane_zeros = 0;  // a byte per block
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      if ((b & group_mask_) == 0) {
        scale[b] = next_scale_[b];
        lane_zeros |= next_zero_[b] << 8 * b;
      } else {
        scale[b] = scale[b == 0 ? 0 : b - 1];
      }
    }
    fetch_scales();

    const char* w_sh_rd = w_sh(slot, i) + lane_ * 4 * layout::gpu::vector_words(kBits);
    const char* x_sh_rd = x_sh(slot, i) + 16 * lane_;
    uint32_t words[kPanels][2][kBits];
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      if (asymmetric && (b & group_mask_) == 0) {
        const uint32_t zeros = ptx::prmt(lane_zeros, 0, 0x4040 + 0x101 * b);
#pragma unroll
        for (int row = 0; row < kRowsHeld; ++row) offsets_[row] = Offsets(ptx::shuffle(zeros, 8 * row + lane_ / 4));
      }
      // Keeps the compiler from reading the next block early, which would take more registers than there are.
      if constexpr (kTiles == 8) ptx::sync_warp();
      uint32_t w[kPanels][2][4];
#pragma unroll
      for (int r = 0; r < kPanels; ++r) {
        read_words<kBits>(words[r], w_sh_rd + r * kPanelBytes, b);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int step = e / 4, h = e % 2, pair = 4 * b + e / 2;
          w[r][step][e % 4] = Expansion::pair(words[r][h], pair, offsets_[2 * r + h]);
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const auto x = *reinterpret_cast<const Vec4*>(x_sh_rd + (b * kTiles + j) * kWarp * 16);
#pragma unroll
        for (int r = 0; r < kPanels; ++r) {
          ptx::mma<kType>(sum_[r][j], w[r][0], x.v[0], x.v[1]);
          ptx::mma<kType>(sum_[r][j], w[r][1], x.v[2], x.v[3]);
        }
      }
      if (b == kChunkBlocks - 1 || (b & group_mask_) == group_mask_) add_group(scale[b]);
    }
  }

  // Scale what the group has summed up, given its scale for the lane's own channel, and start the next group.
  SLIDERQUANT_DEVICE void add_group(float scale) {
#pragma unroll
    for (int r = 0; r < kPanels; ++r) {
      const float upper = ptx::shuffle(scale, 16 * r + lane_ / 4), lower = ptx::shuffle(scale, 16 * r + 8 + lane_ / 4);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total_[r][j][i] += (i < 2 ? upper : lower) * sum_[r][j][i];
          sum_[r][j][i] = 0;
        }
      }
    }
  }

  // Add up the warps that shared K and write whole rows of y, or of this split's partial sums.
  SLIDERQUANT_DEVICE void finish() const {
    auto* sums = reinterpret_cast<float*>(shared_);  // [kWarpsK][kTokens][kSumStride]
#pragma unroll
    for (int r = 0; r < kPanels; ++r) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto place = fragment::c(lane_, i);
          const int row = (warp_n_ * kPanels + r) * fragment::kRows + place.row;
          const int token = j * fragment::kColumns + place.column;
          sums[(warp_k_ * kTokens + token) * kSumStride + row] = total_[r][j][i];
        }
      }
    }
    ptx::sync_threads();
#pragma unroll 1
    for (int at = thread_; at < kTokens * kRows; at += kThreads) {
      const int token = at / kRows, row = at % kRows;
      const int64_t m = m0_ + token, n = n0_ + row;
      if (m >= a_.m || n >= a_.n) continue;
      float y = sums[token * kSumStride + row];
      if constexpr (kWarpsK == 2) y += sums[(kTokens + token) * kSumStride + row];
      if (blocks_.splits > 1) {
        ptx::store(blocks_.partial + (split_ * a_.m + m) * a_.n + n, y);
      } else {
        if (a_.bias != nullptr) y += ptx::load(a_.bias + n);
        ptx::store(a_.y + m * a_.n + n, kType == Float::kFp16 ? float_to_fp16(y) : float_to_bf16(y));
      }
    }
  }

  const Wna16& a_;
  const Wna16Blocks& blocks_;
  char* shared_;
  int thread_, lane_, warp_n_, warp_k_;
  int m0_, n0_, split_, stages_;
  // What the next copy reads, and how much there is left of it.
  const char* w_gl_;      // of the first of the warp's panels
  int64_t w_next_panel_;  // bytes from one panel to the next
  int panels_, w_chunks_;
  uint64_t w_policy_;
  const uint16_t* x_gl_;
  int x_left_;  // k
  bool x_aligned_;
  int group_mask_;  // b & mask is the place of block b within its group, or within the chunk of a longer one
  int64_t scale_at_, scale_step_;
  int scale_left_;  // k
  float next_scale_[kChunkBlocks] = {};
  uint32_t next_zero_[kChunkBlocks] = {};
  Offsets offsets_[kRowsHeld] = {kSymmetric, kSymmetric, kSymmetric, kSymmetric};
  float sum_[kPanels][kTiles][4] = {};    // of the current group
  float total_[kPanels][kTiles][4] = {};  // of the groups before, scaled
};

// y from the partial sums of blocks that shared K, in the order of K.
struct Wna16Reduce {
  static constexpr int kThreads = 256;

  static int64_t blocks(const Wna16& a) { return (a.m * a.n + kThreads - 1) / kThreads; }

  SLIDERQUANT_DEVICE static void run(const Wna16& a, const Wna16Blocks& blocks, int64_t block, int thread) {
    const int64_t at = block * kThreads + thread, size = a.m * a.n;
    if (at >= size) return;
    float y = sum_of_splits(blocks, size, at);
    if (a.bias != nullptr) y += ptx::load(a.bias + at % a.n);
    ptx::store(a.y + at, a.x_type == Float::kFp16 ? float_to_fp16(y) : float_to_bf16(y));
  }
};

}  // namespace sliderquant::cuda
