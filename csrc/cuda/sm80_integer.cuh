// The integer product on tensor cores, from sm_80 on: W4A4, W4A8, W8A8 and weights of 2 and 3 bits, by one path.
//
// A block of eight warps makes kRows output channels for kTokens tokens, over its share of K. Weights become bytes in
// registers, tokens' codes are bytes already, and mma.m16n8k32 multiplies them as unsigned ones, exactly in 32 bits.
// Zero points, scales and bias come in at the end (formula.h), so the loop knows nothing of them.
//
// With up to 64 tokens each warp has channels of its own, and up to 16 two warps share K: the time goes into reading
// weights. With more, two warps share their channels, so that unpacking serves 64 tokens of a warp and what is read of
// the tokens serves 64 channels. A stage of both operands reaches shared memory by asynchronous copies, kStages - 1 of
// them in flight. Blocks may share K too; a second kernel then adds up their sums, in order.
//
// Index names: w weights, x tokens; _gl in global memory, _sh in shared memory, _rd read there, _wr written there;
// b block of 32 k within a chunk, r panel of the warp, h half of its rows, j tile of tokens of the warp.
#pragma once

#include "../args.h"
#include "../formula.h"
#include "../layout.h"
#include "expand.cuh"
#include "ptx.cuh"
#include "sm80_stages.cuh"
#include "sm80_tile.h"

namespace sliderquant::cuda {

using IntegerBlocks = Splits<uint32_t>;

SLIDERQUANT_DEVICE IntegerToken integer_token(const IntegerGemm& a, int64_t m) {
  return {ptx::load(a.sa + m), static_cast<uint32_t>(ptx::load(a.za + m)),
          static_cast<uint32_t>(ptx::load(a.row_sum + m))};
}

SLIDERQUANT_DEVICE IntegerChannel integer_channel(const IntegerGemm& a, int64_t n) {
  return {ptx::load(a.sw + n), a.bias != nullptr ? ptx::load(a.bias + n) : 0,
          a.zw != nullptr ? ptx::load(a.zw + n) : 1u << (a.bits - 1),
          static_cast<uint32_t>(ptx::load(a.col_sum + n))};
}

SLIDERQUANT_DEVICE void store_output(const IntegerGemm& a, int64_t at, float y) {
  if (a.y_type == Float::kFp32) {
    ptx::store(static_cast<float*>(a.y) + at, y);
  } else {
    ptx::store(static_cast<uint16_t*>(a.y) + at, a.y_type == Float::kFp16 ? float_to_fp16(y) : float_to_bf16(y));
  }
}

template <int kBits, int kBlockTokens>
class Sm80Integer {
 public:
  static constexpr Sm80IntegerTile kTile = {kBits, kBlockTokens};
  static constexpr int kThreads = Sm80IntegerTile::kWarps * kWarp;
  static constexpr int kTokens = kTile.tokens();
  static constexpr int kTiles = kTile.tiles();
  static constexpr int kWarpsK = kTile.warps_k();
  static constexpr int kWarpsM = kTile.warps_m();
  static constexpr int kWarpsN = kTile.warps_n();
  static constexpr int kPanels = kTile.panels();
  static constexpr int kRows = kTile.rows();
  static constexpr int kStageChunks = kTile.stage_chunks();
  static constexpr int kMinBlocks = kTile.blocks_per_processor();
  static constexpr int kStages = kTile.stages();
  static constexpr int kStageBytes = kTile.stage_bytes();
  static constexpr int kSharedBytes = kTile.shared_bytes();
  static constexpr int kRowBytes = Sm80IntegerTile::kRowBytes;
  static constexpr int kPanelBytes = 4 * layout::gpu::chunk_words(kBits);  // of a chunk

  // Copies of weights: half a warp takes a panel's chunk, or several.
  static constexpr int kCopiers = kThreads / 16;
  static constexpr int kPanelCopies = kPanelBytes / (16 * 16);
  // Copies of tokens: eight threads take a row, 16 bytes each, and all threads kRowsCopied rows.
  static constexpr int kRowsCopied = kThreads * 16 / kRowBytes;
  static constexpr int kStageRows = kStageChunks * kTokens;
  static constexpr int kXCopies = (kStageRows + kRowsCopied - 1) / kRowsCopied;

  static_assert(Sm80IntegerTile::kTileTokens == fragment::kColumns, "a tile must be the columns of one product");
  static_assert(layout::gpu::kPanelRows == fragment::kRows, "a panel must be the rows of one product");
  static_assert(layout::kBlockCodes == fragment::depth(8), "a block of k must be one product");
  static_assert(layout::gpu::kLaneCodes == 8, "a lane must own two registers of bytes of every block");
  static_assert(kTile.stage_panels() % kCopiers == 0, "every half of a warp must copy equally many panels");
  static_assert(kPanelBytes % (16 * 16) == 0, "a panel's chunk must be whole copies of half a warp");
  static_assert(kRowsCopied % kTokens == 0 || (kTokens % kRowsCopied == 0 && kStageChunks == 1),
                "the rows that a thread copies must all be of one token, or all of one chunk");
  static_assert(kRowsCopied % 4 == 0, "all rows that a thread copies must be swizzled alike");
  static_assert(kThreads % kRows == 0, "a thread must write one channel alone");
  static_assert(kTiles % kTile.passes() == 0, "a pass must be whole tiles of each warp");
  static_assert(kStages >= 2, "copies must be in flight while the warps compute");
  static_assert(kSharedBytes <= 99 << 10, "a block must fit into the shared memory of sm_89");
  static_assert(kWarpsK <= 2, "finish adds up two warps at most");

  static int64_t blocks(const IntegerGemm& a, int splits) {
    return kTile.n_tiles(a.n) * splits * kTile.m_tiles(a.m);
  }

  SLIDERQUANT_DEVICE static void run(const IntegerGemm& a, const IntegerBlocks& blocks, int64_t block, int thread,
                                     char* shared) {
    Sm80Integer kernel(a, blocks, block, thread, shared);
    kernel.multiply();
    kernel.finish();
  }

 private:
  SLIDERQUANT_DEVICE Sm80Integer(const IntegerGemm& a, const IntegerBlocks& blocks, int64_t block, int thread,
                                 char* shared)
      : a_(a),
        blocks_(blocks),
        shared_(shared),
        thread_(thread),
        lane_(thread % kWarp),
        warp_n_(thread / kWarp % kWarpsN),
        warp_m_(thread / kWarp / kWarpsN % kWarpsM),
        warp_k_(thread / kWarp / (kWarpsN * kWarpsM)) {
    const BlockShare share = block_share<Sm80Integer>(a.m, a.k, blocks.splits, block);
    const int chunks = share.chunks, chunk0 = share.chunk0;
    m0_ = share.m0;
    n0_ = share.n0;
    split_ = share.split;
    stages_ = share.stages;

    const int copier = thread / 16;
    const int panel = n0_ / layout::gpu::kPanelRows + copier / kStageChunks;
    const int64_t w_chunk = static_cast<int64_t>(panel) * chunks + chunk0 + copier % kStageChunks;
    w_gl_ = reinterpret_cast<const char*>(a.w) + w_chunk * kPanelBytes + thread % 16 * 16;
    w_next_panel_ = static_cast<int64_t>(chunks) * kPanelBytes;
    panels_ = static_cast<int>(layout::gpu::panels(a.n)) - panel;
    w_chunks_ = chunks - chunk0 - copier % kStageChunks;
    w_policy_ = share.reads_alone ? ptx::evict_first() : ptx::evict_normal();

    const int row = thread / 8, token = m0_ + row % kTokens;
    const int k = (chunk0 + row / kTokens) * layout::gpu::kChunkCodes + thread % 8 * 16;
    x_gl_ = a.codes + static_cast<int64_t>(token) * a.k + k;
    x_tokens_ = row < kStageRows ? static_cast<int>(a.m) - token : 0;
    x_left_ = static_cast<int>(a.k) - k;
    // A row of 128 bytes covers all banks. Lanes read 32 bytes each of four rows at a time: every row begins with
    // another of its four blocks.
    x_wr_ = row * kRowBytes + (thread % 8 / 2 ^ row % 4) * layout::kBlockCodes + thread % 2 * 16;
  }

  SLIDERQUANT_DEVICE void multiply() {
    const auto compute_stage = [this](int slot) {
#pragma unroll 1
      for (int i = 0; i < kTile.chunks(); ++i) compute(slot, i * kWarpsK + warp_k_);
    };
    run_stages<kStages, kStageBytes>(stages_, [this](int slot) { copy_stage(slot); }, compute_stage);
  }

  // Each call copies the next stage.
  SLIDERQUANT_DEVICE void copy_stage(int slot) {
#pragma unroll
    for (int i = 0; i < kTile.stage_panels() / kCopiers; ++i) {
      static_assert(kCopiers % kStageChunks == 0, "the panels' chunks that a thread copies must be of one chunk");
      constexpr int kStep = kCopiers / kStageChunks;  // panels from one to the next
      if (i * kStep >= panels_ || w_chunks_ <= 0) continue;
      char* w_sh_wr = shared_ + slot + (i * kCopiers + thread_ / 16) * kPanelBytes + thread_ % 16 * 16;
#pragma unroll
      for (int copy = 0; copy < kPanelCopies; ++copy) {
        ptx::cp_async(w_sh_wr + 256 * copy, w_gl_ + i * kStep * w_next_panel_ + 256 * copy, w_policy_);
      }
    }
    w_gl_ += kStageChunks * kPanelBytes;
    w_chunks_ -= kStageChunks;

    // Zeros where there is no token or no such k: there the weights are anything.
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      constexpr int kNextToken = kTokens > kRowsCopied ? kRowsCopied : 0;
      constexpr int kNextK = kTokens > kRowsCopied ? 0 : kRowsCopied / kTokens * layout::gpu::kChunkCodes;
      if (kStageRows % kRowsCopied != 0 && thread_ / 8 >= kStageRows) continue;
      const bool exists = i * kNextToken < x_tokens_ && i * kNextK < x_left_;
      const uint8_t* x_gl_rd = x_gl_ + (i * kNextToken * a_.k + i * kNextK);
      ptx::cp_async(shared_ + slot + kTile.weight_bytes() + x_wr_ + i * kRowsCopied * kRowBytes,
                    exists ? x_gl_rd : a_.codes, exists);
    }
    x_gl_ += kStageChunks * layout::gpu::kChunkCodes;
    x_left_ -= kStageChunks * layout::gpu::kChunkCodes;
  }

  // One chunk of a stage.
  SLIDERQUANT_DEVICE void compute(int slot, int chunk) {
    const char* w_sh_rd = shared_ + slot + (warp_n_ * kPanels * kStageChunks + chunk) * kPanelBytes +
                          lane_ * 4 * layout::gpu::vector_words(kBits);
    const char* x_sh_rd = shared_ + slot + kTile.weight_bytes() +
                          (chunk * kTokens + warp_m_ * kTiles * fragment::kColumns + lane_ / 4) * kRowBytes +
                          lane_ % 4 * layout::gpu::kLaneCodes;
    uint32_t words[kPanels][2][kBits];
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      uint32_t w[kPanels][4];
#pragma unroll
      for (int r = 0; r < kPanels; ++r) {
        read_words<kBits>(words[r], w_sh_rd + r * kStageChunks * kPanelBytes, b);
#pragma unroll
        for (int e = 0; e < 4; ++e) w[r][e] = expand_quad<kBits>(words[r][e % 2], 2 * b + e / 2);
      }
      const char* x_sh_block = x_sh_rd + (b ^ lane_ / 4 % 4) * layout::kBlockCodes;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const auto x = *reinterpret_cast<const Vec2*>(x_sh_block + j * fragment::kColumns * kRowBytes);
#pragma unroll
        for (int r = 0; r < kPanels; ++r) ptx::mma_int8<false, false>(sum_[r][j], w[r], x.v[0], x.v[1]);
      }
    }
  }

  // Add up the warps that shared K and write whole rows of y, or of this split's partial sums.
  SLIDERQUANT_DEVICE void finish() const {
    constexpr int kPassTiles = kTiles / kTile.passes(), kPassTokens = kPassTiles * fragment::kColumns;  // of a warp
    constexpr int kStride = kTile.sum_stride();
    auto* sums = reinterpret_cast<int32_t*>(shared_);  // [kWarpsK][kWarpsM][kPassTokens][kStride]
    const int row = thread_ % kRows;
    const int64_t n = n0_ + row;
    const bool exists = n < a_.n;
    const bool whole = blocks_.splits == 1;
    const IntegerChannel channel = exists && whole ? integer_channel(a_, n) : IntegerChannel{};
#pragma unroll
    for (int pass = 0; pass < kTile.passes(); ++pass) {
      if (pass > 0) ptx::sync_threads();
#pragma unroll
      for (int r = 0; r < kPanels; ++r) {
#pragma unroll
        for (int j = 0; j < kPassTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const auto place = fragment::c(lane_, i);
            const int token = (warp_k_ * kWarpsM + warp_m_) * kPassTokens + j * fragment::kColumns + place.column;
            sums[token * kStride + (warp_n_ * kPanels + r) * fragment::kRows + place.row] =
                sum_[r][pass * kPassTiles + j][i];
          }
        }
      }
      ptx::sync_threads();
      if (!exists) continue;
#pragma unroll 1
      for (int at = thread_ / kRows; at < kWarpsM * kPassTokens; at += kThreads / kRows) {
        const int token = at / kPassTokens * kTiles * fragment::kColumns + pass * kPassTokens + at % kPassTokens;
        const int64_t m = m0_ + token;
        if (m >= a_.m) continue;
        auto sum = static_cast<uint32_t>(sums[at * kStride + row]);
        if constexpr (kWarpsK == 2) sum += static_cast<uint32_t>(sums[(kWarpsM * kPassTokens + at) * kStride + row]);
        if (whole) {
          store_output(a_, m * a_.n + n, integer_output(integer_token(a_, m), channel, a_.k, a_.bias != nullptr, sum));
        } else {
          ptx::store(blocks_.partial + (split_ * a_.m + m) * a_.n + n, sum);
        }
      }
    }
  }

  const IntegerGemm& a_;
  const IntegerBlocks& blocks_;
  char* shared_;
  int thread_, lane_, warp_n_, warp_m_, warp_k_;
  int m0_, n0_, split_, stages_;
  // What the next copy reads, and how much there is left of it.
  const char* w_gl_;
  int64_t w_next_panel_;  // bytes from one panel to the next
  int panels_, w_chunks_;
  uint64_t w_policy_;
  const uint8_t* x_gl_;
  int x_tokens_, x_left_;  // k
  int x_wr_;               // where it goes within the tokens of a stage
  int32_t sum_[kPanels][kTiles][4] = {};
};

// y from the partial sums of blocks that shared K.
struct IntegerReduce {
  static constexpr int kThreads = 256;

  static int64_t blocks(const IntegerGemm& a) { return (a.m * a.n + kThreads - 1) / kThreads; }

  SLIDERQUANT_DEVICE static void run(const IntegerGemm& a, const IntegerBlocks& blocks, int64_t block, int thread) {
    const int64_t at = block * kThreads + thread, size = a.m * a.n;
    if (at >= size) return;
    const uint32_t sum = sum_of_splits(blocks, size, at);
    const int64_t m = at / a.n, n = at % a.n;
    store_output(a, at, integer_output(integer_token(a, m), integer_channel(a, n), a.k, a.bias != nullptr, sum));
  }
};

}  // namespace sliderquant::cuda
