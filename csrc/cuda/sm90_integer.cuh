// The integer product on the tensor cores of sm_90a, for many tokens: W4A4, W4A8, W8A8 and weights of 2 and 3 bits.
//
// Weights become unsigned bytes in registers and meet the tokens' codes in shared memory (sm90_stages.cuh); sums are
// exact in 32 bits. Zero points, scales and bias come in at the end, by formula.h: results are those of the plain
// kernel bit by bit.
//
// Index names: w weights; r half of a panel's rows, p part of a warpgroup's channels, b block of 32 k within a chunk,
// j tile of eight tokens.
#pragma once

#include "sm80_integer.cuh"
#include "sm90_stages.cuh"

namespace sliderquant::cuda {

using Sm90IntegerBlocks = Sm90Blocks<uint32_t>;

template <int kBits, int kBlockTokens>
class Sm90Integer {
 public:
  using Sum = int32_t;
  using Stages = Sm90Stages<Sm90Integer>;
  static constexpr Sm90Tile kTile = {kBits, kBlockTokens, 1};
  static constexpr Operand kOperand = Operand::kByte;
  static constexpr int kParts = Sm90Tile::kParts;
  static constexpr int kTiles = kBlockTokens / fragment::kColumns;
  static constexpr int kSums = kBlockTokens / 2;  // of a thread, per part
  static constexpr int kThreads = Sm90Tile::kThreads;
  static constexpr int kSharedBytes = kTile.shared_bytes();

  static_assert(layout::kBlockCodes == fragment::depth(8), "a block of k must be one product");

  SLIDERQUANT_DEVICE static void run(const IntegerGemm& a, const Sm90IntegerBlocks& blocks, int block, int grid,
                                     int thread, char* shared) {
    Stages::run(a, blocks, block, grid, thread, shared);
  }

  SLIDERQUANT_DEVICE Sm90Integer(const IntegerGemm& a, const Sm90IntegerBlocks& blocks, int warp, int lane)
      : a_(a), blocks_(blocks), warp_(warp), lane_(lane) {}

  SLIDERQUANT_DEVICE void begin(const Sm90Work&, bool) {}
  SLIDERQUANT_DEVICE void begin_chunk() {}

  SLIDERQUANT_DEVICE void expand(int b, const char* w_sh_rd, uint32_t (&w)[kParts][1][4]) {
    constexpr int kGroupWarps = Sm90Tile::kConsumers / 2;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      read_words<kBits>(words_[p], w_sh_rd + p * kGroupWarps * kTile.panel_bytes(), b);
#pragma unroll
      for (int e = 0; e < 4; ++e) w[p][0][e] = expand_quad<kBits>(words_[p][e % 2], 2 * b + e / 2);
    }
  }

  SLIDERQUANT_DEVICE void finish(const Sm90Work& work, const int32_t (&sum)[kParts][kSums]) const {
    if (blocks_.splits > 1) {
      write<WordsWriter<uint32_t>>(work, sum, blocks_.partial + work.split * a_.m * a_.n);
    } else if (a_.y_type == Float::kFp32) {
      write<WordsWriter<float>>(work, sum, static_cast<float*>(a_.y));
    } else if (a_.y_type == Float::kFp16) {
      write<HalvesWriter<Float::kFp16>>(work, sum, static_cast<uint16_t*>(a_.y));
    } else {
      write<HalvesWriter<Float::kBf16>>(work, sum, static_cast<uint16_t*>(a_.y));
    }
  }

 private:
  // Sums as they are, or outputs.
  template <class Writer, class T>
  SLIDERQUANT_DEVICE void write(const Sm90Work& work, const int32_t (&sum)[kParts][kSums], T* to) const {
    constexpr bool kWhole = !std::is_same_v<T, uint32_t>;
    using Value = std::conditional_t<kWhole, float, uint32_t>;
    IntegerChannel channel[kParts][2] = {};
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t n = sm90_channel(work, warp_, p) + fragment::c(lane_, 2 * r).row;
        if (kWhole && n < a_.n) channel[p][r] = integer_channel(a_, n);
      }
    }
    Writer writers[kParts] = {{to, a_.m, a_.n, work.m0, sm90_channel(work, warp_, 0), lane_},
                              {to, a_.m, a_.n, work.m0, sm90_channel(work, warp_, 1), lane_}};
    static_assert(kParts == 2, "a writer for each part");
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int m0 = work.m0 + j * fragment::kColumns;
      if (m0 >= a_.m) break;
      IntegerToken token[2] = {};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int m = m0 + fragment::c(lane_, c).column;
        if (kWhole && m < a_.m) token[c] = integer_token(a_, m);
      }
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        Value v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto exact = static_cast<uint32_t>(sum[p][4 * j + i]);
          if constexpr (kWhole) {
            v[i] = integer_output(token[i % 2], channel[p][i / 2], a_.k, a_.bias != nullptr, exact);
          } else {
            v[i] = exact;
          }
        }
        writers[p].write(j, v);
      }
    }
  }

  const IntegerGemm& a_;
  const Sm90IntegerBlocks& blocks_;
  int warp_, lane_;
  uint32_t words_[kParts][2][kBits];
};

}  // namespace sliderquant::cuda
