// W*A16 on the tensor cores of sm_90a, for many tokens.
//
// Codes become 16-bit floats in registers, code - zero exactly, and meet the tokens in shared memory (sm90_stages.cuh).
// One scale per channel multiplies the fp32 sums at the end, exactly. With groups the registers are multiplied by the
// group's scale, taken as the sum of two 16-bit floats, so that a weight is rounded once, to the 16 bits of x: fp32
// sums of every group would not fit into the registers beside their total. Scales of fp16 are first divided by a power
// of two of their channel, that none of its scales exceeds, and the sums are multiplied by it.
//
// Index names: w weights; r row of the lane (g and g + 8 of every part), p part of a warpgroup's channels, b block of
// 32 k within a chunk, j tile of eight tokens.
#pragma once

#include "sm80_wna16.cuh"
#include "sm90_stages.cuh"

namespace sliderquant::cuda {

using Sm90Wna16Blocks = Sm90Blocks<float>;

template <int kBits, Float kType, bool kGroups, int kBlockTokens>
class Sm90Wna16 {
 public:
  using Sum = float;
  using Stages = Sm90Stages<Sm90Wna16>;
  static constexpr Sm90Tile kTile = {kBits, kBlockTokens, 2};
  static constexpr Operand kOperand = kType == Float::kFp16 ? Operand::kFp16 : Operand::kBf16;
  static constexpr int kParts = Sm90Tile::kParts;
  static constexpr int kTiles = kBlockTokens / fragment::kColumns;
  static constexpr int kSums = kBlockTokens / 2;  // of a thread, per part
  static constexpr int kThreads = Sm90Tile::kThreads;
  static constexpr int kSharedBytes = kTile.shared_bytes();

  static_assert(layout::kBlockCodes == 2 * fragment::depth(16), "a block of k must be two products");
  static_assert(kParts * layout::gpu::kPanelRows == kWarp, "each lane of a warp fetches the scale of one channel");

  SLIDERQUANT_DEVICE static void run(const Wna16& a, const Sm90Wna16Blocks& blocks, int block, int grid, int thread,
                                     char* shared) {
    Stages::run(a, blocks, block, grid, thread, shared);
  }

  SLIDERQUANT_DEVICE Sm90Wna16(const Wna16& a, const Sm90Wna16Blocks& blocks, int warp, int lane)
      : a_(a), blocks_(blocks), warp_(warp), lane_(lane) {
    group_mask_ = a.group == 128 ? kChunkBlocks - 1 : a.group == 64 ? 1 : 0;
  }

  SLIDERQUANT_DEVICE void begin(const Sm90Work& work, bool first) {
    constexpr int kPanelRows = layout::gpu::kPanelRows;
    const int64_t channel = sm90_channel(work, warp_, lane_ / kPanelRows) + lane_ % kPanelRows;
    const bool exists = channel < a_.n;
    if constexpr (kGroups) {
      const int k0 = work.chunk0 * layout::gpu::kChunkCodes;
      scale_at_ = k0 / static_cast<int>(a_.group) * a_.n + channel;
      scale_left_ = exists ? static_cast<int>(a_.k) - k0 : 0;
      shrink_ = 1;
      if constexpr (kType == Float::kFp16) {
        if (first) ptx::wait_for_grid();  // which measured the magnitudes
        // The reciprocal of a power of two.
        if (exists) {
          shrink_ = bits_to_float((254u << 23) - float_to_bits(ptx::load_of_grid_ahead(blocks_.magnitudes + channel)));
        }
      }
      fetch_scales();
    } else if (a_.zero != nullptr) {
      const uint32_t zero = exists ? ptx::load(a_.zero + channel) : 0;
#pragma unroll
      for (int r = 0; r < kRowsHeld; ++r) offsets_[r] = Offsets(ptx::shuffle(zero * 0x10001u, 8 * r + lane_ / 4));
    }
  }

  SLIDERQUANT_DEVICE void begin_chunk() {
    if constexpr (kGroups) {
#pragma unroll
      for (int b = 0; b < kChunkBlocks; ++b) {
        scale_[b] = next_scale_[b];
        zero_[b] = next_zero_[b];
      }
      fetch_scales();
    }
  }

  SLIDERQUANT_DEVICE void expand(int b, const char* w_sh_rd, uint32_t (&w)[kParts][2][4]) {
    constexpr int kGroupWarps = Sm90Tile::kConsumers / 2;
    if constexpr (kGroups) {
      if ((b & group_mask_) == 0) begin_group(scale_[b], zero_[b]);
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      read_words<kBits>(words_[p], w_sh_rd + p * kGroupWarps * kTile.panel_bytes(), b);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int row = 2 * p + e % 2;
        uint32_t pair = Expansion::pair(words_[p][e % 2], 4 * b + e / 2, offsets_[row]);
        if constexpr (kGroups) pair = ptx::scale2<kType>(pair, high_[row], low_[row]);
        w[p][e / 4][e % 4] = pair;
      }
    }
  }

  SLIDERQUANT_DEVICE void finish(const Sm90Work& work, const float (&sum)[kParts][kSums]) const {
    if (blocks_.splits == 1) {
      write<HalvesWriter<kType>>(work, sum, a_.y, a_.bias);
    } else {
      write<WordsWriter<float>>(work, sum, blocks_.partial + work.split * a_.m * a_.n, nullptr);
    }
  }

 private:
  using Expansion = Expand<kBits, kType>;
  using Offsets = typename Expansion::Offsets;
  static constexpr uint32_t kSymmetric = (1u << (kBits - 1)) * 0x10001u;
  static constexpr int kRowsHeld = 2 * kParts;

  template <class Writer, class T>
  SLIDERQUANT_DEVICE void write(const Sm90Work& work, const float (&sum)[kParts][kSums], T* to,
                                const float* bias) const {
    const float* scales = kGroups ? blocks_.magnitudes : a_.scale;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int64_t n0 = sm90_channel(work, warp_, p);
      if (n0 >= a_.n) continue;
      Writer writer(to, a_.m, a_.n, work.m0, n0, lane_);
      float scale[2], offset[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t n = n0 + fragment::c(lane_, 2 * r).row;
        scale[r] = n < a_.n && scales != nullptr ? ptx::load_of_grid_ahead(scales + n) : 1;
        offset[r] = n < a_.n && bias != nullptr ? ptx::load(bias + n) : 0;
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (work.m0 + j * fragment::kColumns >= a_.m) break;
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = sum[p][4 * j + i] * scale[i / 2] + offset[i / 2];
        writer.write(j, v);
      }
    }
  }

  // Of this lane's channel, the scale and the zero point of every group of the next chunk. Nothing may touch them
  // before that chunk: it would wait for memory here.
  SLIDERQUANT_DEVICE void fetch_scales() {
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      if ((b & group_mask_) != 0) continue;
      const bool exists = b * layout::kBlockCodes < scale_left_;
      next_scale_[b] = exists ? ptx::load(a_.scale + scale_at_) : 0;
      next_zero_[b] = exists && a_.zero != nullptr ? ptx::load(a_.zero + scale_at_) : 0;
      scale_at_ += a_.n;
    }
    scale_left_ -= layout::gpu::kChunkCodes;
  }

  // Of every row of the lane, the offsets and both parts of the scale, given those of the lane's own channel.
  SLIDERQUANT_DEVICE void begin_group(float scale, uint32_t zero) {
    scale *= shrink_;
    const uint32_t high = ptx::pack2<kType>(scale, 0);
    const float rest = scale - (kType == Float::kFp16 ? fp16_to_float(static_cast<uint16_t>(high))
                                                      : bf16_to_float(static_cast<uint16_t>(high)));
    const uint32_t both = ptx::pack2<kType>(scale, rest);
#pragma unroll
    for (int r = 0; r < kRowsHeld; ++r) {
      const int from = 8 * r + lane_ / 4;
      const uint32_t scales = ptx::shuffle(both, from);
      high_[r] = ptx::prmt(scales, 0, 0x1010);
      low_[r] = ptx::prmt(scales, 0, 0x3232);
      if (a_.zero != nullptr) offsets_[r] = Offsets(ptx::shuffle(zero * 0x10001u, from));
    }
  }

  const Wna16& a_;
  const Sm90Wna16Blocks& blocks_;
  int warp_, lane_;
  int group_mask_;  // b & mask is the place of block b within its group
  int64_t scale_at_ = 0;
  int scale_left_ = 0;  // k
  float shrink_ = 1;
  float scale_[kChunkBlocks], next_scale_[kChunkBlocks] = {};
  uint32_t zero_[kChunkBlocks], next_zero_[kChunkBlocks] = {};
  uint32_t high_[kRowsHeld], low_[kRowsHeld];
  Offsets offsets_[kRowsHeld] = {kSymmetric, kSymmetric, kSymmetric, kSymmetric};
  uint32_t words_[kParts][2][kBits];
};

}  // namespace sliderquant::cuda
