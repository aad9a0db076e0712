// What the kernels for sm_90a have in common: one warp copies stages of weights and tokens into a ring in shared
// memory, two warpgroups multiply them, and barriers in shared memory pass the slots of the ring to and fro.
//
// Two blocks form a cluster: they take the same tokens and neighbouring channels, and each fetches half of the tokens
// for both, which halves what L2 has to give.
//
// A block of threads stays for several shares of the work (Sm90Work), so that the copies of the next one run while the
// sums of the last one are written. Each warpgroup has kParts runs of 64 channels for all tokens of the block; a warp
// makes 16 channels of each run, out of one panel of weights.
//
// Codes are expanded into registers, as the A operand of the products, which read the tokens from shared memory. There
// are two sets of these registers: while the products of one block of 32 k run, the codes of the next one are expanded.
//
// A kernel is given work (begin), the scales of one chunk after the other (begin_chunk), makes operands of a block
// (expand) and writes the sums (finish).
#pragma once

#include "../layout.h"
#include "expand.cuh"
#include "ptx_sm90.cuh"
#include "sm90_tile.h"

namespace sliderquant::cuda {

// What a kernel of this kind is given beside the arguments of the op.
template <class Sum>
struct Sm90Blocks {
  int splits;
  const void* image;        // of the tokens
  const float* magnitudes;  // of the channels, or null
  Sum* partial;             // [splits, m, n], null for one split
};

// Where a warp stands in the ring of slots, and the parity of the phase that it waits for there.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  SLIDERQUANT_DEVICE void advance() {
    if (++slot < kSlots) return;
    slot = 0;
    parity ^= 1;
  }
};

template <class Kernel>
class Sm90Stages {
 public:
  static constexpr Sm90Tile kTile = Kernel::kTile;
  static constexpr int kThreads = Sm90Tile::kThreads;
  static constexpr int kStages = kTile.stages();
  static constexpr int kPanelBytes = kTile.panel_bytes();
  static constexpr int kParts = Sm90Tile::kParts;
  static constexpr int kSums = kTile.tokens() / 2;  // of a thread, per part
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kSteps = layout::kBlockCodes * kTile.element_bytes / swizzled::kDepthBytes;  // of a block

  static_assert(Sm90Tile::kRowBytes == swizzled::kRowBytes, "a column of the image must be a row of the swizzle");
  static_assert(image::kAtomRows == swizzled::kAtomRows, "the image must be swizzled as products read it");
  static_assert(kTile.column_bytes() % swizzled::kAtomBytes == 0 && kTile.stage_bytes() % swizzled::kAtomBytes == 0,
                "every column of a stage must begin with an atom");
  static_assert(layout::gpu::kPanelRows == fragment::kRows, "a panel must be the rows of one warp's product");
  static_assert(kChunkBlocks % 2 == 0, "blocks must alternate between two sets of registers in every chunk alike");
  static_assert(kPanelBytes % 16 == 0, "a panel's chunk must be a bulk copy");
  static_assert(Sm90Tile::kPanels + kTile.columns() <= kWarp, "each copy of a stage must have a lane of its own");
  static_assert(kTile.tokens() / Sm90Tile::kCluster % swizzled::kAtomRows == 0, "blocks must fetch whole atoms");
  static_assert(kStages >= 2, "copies must run while the warps compute");
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168,
                "three warpgroups must not have more registers than those that the grid begins with");
  static_assert(kThreads == 3 * 4 * kWarp, "registers go from one warpgroup to two");
  static_assert(kTile.shared_bytes() <= 227 << 10, "a block must fit into the shared memory of sm_90");

  template <class Args, class Blocks>
  SLIDERQUANT_DEVICE static void run(const Args& a, const Blocks& blocks, int block, int grid, int thread,
                                     char* shared) {
    Sm90Stages stages(shared);
    if (thread == 0) {
      for (int slot = 0; slot < kStages; ++slot) {
        ptx::barrier_init(stages.full(slot), 1);
        ptx::barrier_init(stages.empty(slot), Sm90Tile::kCluster * Sm90Tile::kConsumers);
      }
      ptx::barrier_fence();
    }
    ptx::sync_cluster();
    constexpr auto tile = kTile;
    constexpr int kCluster = Sm90Tile::kCluster;
    const auto works = static_cast<int>(tile.works(a.m, a.n, blocks.splits));
    const int rank = block % kCluster;
    const auto work = [&](int index) { return sm90_work(tile, a.m, a.n, a.k, blocks.splits, index, rank); };
    // The warp's own number, of which the compiler shall know that all lanes have it.
    const int warp = ptx::shuffle(thread / kWarp, 0), first = block / kCluster, step = grid / kCluster;
    if (warp >= Sm90Tile::kConsumers) {
      ptx::give_registers<kProducerRegisters>();
      if (warp == Sm90Tile::kConsumers) {
        for (int index = first; index < works; index += step) {
          stages.produce(a, blocks, work(index), rank, thread % kWarp, index == first);
        }
      }
    } else {
      ptx::take_registers<kConsumerRegisters>();
      Kernel kernel(a, blocks, warp, thread % kWarp);
      for (int index = first; index < works; index += step) {
        stages.consume(kernel, work(index), a.k, warp, thread % kWarp, index == first);
      }
    }
    // No block may end while another one still reaches into its shared memory.
    ptx::sync_cluster();
  }

 private:
  SLIDERQUANT_DEVICE explicit Sm90Stages(char* shared) : shared_(shared) {}

  // Filled with a stage, and free for the next one.
  SLIDERQUANT_DEVICE uint64_t* full(int slot) const {
    return reinterpret_cast<uint64_t*>(shared_ + kStages * kTile.stage_bytes()) + slot;
  }
  SLIDERQUANT_DEVICE uint64_t* empty(int slot) const { return full(kStages + slot); }
  SLIDERQUANT_DEVICE char* x_sh(int slot) const { return shared_ + slot * kTile.stage_bytes(); }
  SLIDERQUANT_DEVICE char* w_sh(int slot) const { return x_sh(slot) + kTile.x_bytes(); }

  // All stages of a share: a lane for every panel of weights, and one for this block's tokens of every column.
  template <class Args, class Blocks>
  SLIDERQUANT_DEVICE void produce(const Args& a, const Blocks& blocks, const Sm90Work& work, int rank, int lane,
                                  bool first) {
    constexpr int kColumns = kTile.columns();
    const int chunks = static_cast<int>(layout::gpu::chunks(a.k)), panel0 = work.n0 / layout::gpu::kPanelRows;
    const int panels_left = static_cast<int>(layout::gpu::panels(a.n)) - panel0;
    const int panels = panels_left < 0 ? 0 : panels_left < Sm90Tile::kPanels ? panels_left : Sm90Tile::kPanels;
    const int64_t m_padded = image::padded_m(a.m);
    const auto m_left = static_cast<int>(m_padded - work.m0);
    const int rows = m_left < kTile.tokens() ? m_left : kTile.tokens();
    constexpr int kShare = kTile.tokens() / Sm90Tile::kCluster;
    const int row0 = rank * kShare, rows_left = rows - row0;
    const int own_rows = rows_left < 0 ? 0 : rows_left < kShare ? rows_left : kShare;
    const int stage_bytes = panels * kPanelBytes + kColumns * rows * swizzled::kRowBytes;

    const bool of_weights = lane < Sm90Tile::kPanels, of_tokens = !of_weights && lane < Sm90Tile::kPanels + kColumns;
    const int column = lane - Sm90Tile::kPanels;
    const char* gl_rd = nullptr;
    int64_t step = 0;  // from one chunk to the next
    int bytes = 0, sh_wr = 0;
    if (of_weights && lane < panels) {
      gl_rd = reinterpret_cast<const char*>(a.w) +
              (static_cast<int64_t>(panel0 + lane) * chunks + work.chunk0) * kPanelBytes;
      step = bytes = kPanelBytes;
      sh_wr = kTile.x_bytes() + lane * kPanelBytes;
    } else if (of_tokens) {
      const int64_t column_bytes = m_padded * swizzled::kRowBytes;
      gl_rd = static_cast<const char*>(blocks.image) + (work.chunk0 * kColumns + column) * column_bytes +
              static_cast<int64_t>(work.m0 + row0) * swizzled::kRowBytes;
      step = kColumns * column_bytes;
      bytes = own_rows * swizzled::kRowBytes;
      sh_wr = column * kTile.column_bytes() + row0 * swizzled::kRowBytes;
    }
    // Weights that no other block needs are the first to go.
    const uint64_t policy = of_weights && a.m <= kTile.tokens() ? ptx::evict_first() : ptx::evict_normal();
    // Bytes may come before they are counted on.
    const auto begin_stage = [&](int slot, int chunk) {
      if (lane == 0) ptx::barrier_arrive(full(slot), stage_bytes);
      if (of_weights && bytes > 0) ptx::bulk_copy(x_sh(slot) + sh_wr, gl_rd + chunk * step, bytes, full(slot), policy);
    };
    // The image is made by the grid ahead; weights were there before, and all slots are free.
    const int ahead = !first ? 0 : work.chunks < kStages ? work.chunks : kStages;
    if (first) {
#pragma unroll 1
      for (int chunk = 0; chunk < ahead; ++chunk) begin_stage(chunk, chunk);
      ptx::wait_for_grid();
    }
#pragma unroll 1
    for (int chunk = 0; chunk < work.chunks; ++chunk) {
      if (chunk >= ahead) {
        ptx::barrier_wait<true>(empty(place_.slot), place_.parity ^ 1);
        ptx::sync_warp();  // all lanes have seen this phase before it can go by
        begin_stage(place_.slot, chunk);
      }
      if (of_tokens && bytes > 0) {
        ptx::bulk_copy_to_cluster<Sm90Tile::kCluster>(x_sh(place_.slot) + sh_wr, gl_rd + chunk * step, bytes,
                                                      full(place_.slot), policy);
      }
      place_.advance();
    }
  }

  SLIDERQUANT_DEVICE void consume(Kernel& kernel, const Sm90Work& work, int64_t k, int warp, int lane, bool first) {
    using Sum = typename Kernel::Sum;
    constexpr int kGroupWarps = Sm90Tile::kConsumers / 2;
    Sum sum[kParts][kSums];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[p][i] = 0;
    }
    uint32_t w[2][kParts][kSteps][4] = {};  // zeros stay where K ends within its first chunk
    const int panel = warp / kGroupWarps * kParts * kGroupWarps + warp % kGroupWarps;  // of part 0, in the block
    kernel.begin(work, first);
    int k_left = static_cast<int>(k) - work.chunk0 * layout::gpu::kChunkCodes;
    int held = -1;  // the slot that the products before may still read
#pragma unroll 1
    for (int chunk = 0; chunk < work.chunks; ++chunk) {
      kernel.begin_chunk();
      ptx::barrier_wait(full(place_.slot), place_.parity);
      const char* w_sh_rd =
          w_sh(place_.slot) + panel * kPanelBytes + lane * 4 * layout::gpu::vector_words(kTile.bits);
      const uint64_t x = swizzled::descriptor(ptx::shared_address(x_sh(place_.slot)));
#pragma unroll
      for (int b = 0; b < kChunkBlocks; ++b) {
        auto& operand = w[b % 2];
        // Also keeps the compiler from making operands among the products before: it would let these end first.
        if (b * layout::kBlockCodes < k_left) kernel.expand(b, w_sh_rd, operand);
#pragma unroll
        for (int i = 0; i < kParts * kSteps * 4; ++i) ptx::pin(operand[i / (4 * kSteps)][i / 4 % kSteps][i % 4]);
        ptx::product_fence();
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          constexpr int kDepth = swizzled::kDepthBytes, kRow = swizzled::kRowBytes;
          const int at = (b * kSteps + s) * kDepth;
          const uint64_t x_step = swizzled::advanced(x, at / kRow * kTile.column_bytes() + at % kRow);
#pragma unroll
          for (int p = 0; p < kParts; ++p) ptx::product<Kernel::kOperand>(sum[p], operand[p][s], x_step);
        }
        ptx::product_commit();
        // The products before these are done: their registers are free for the next block, and so is their slot.
        ptx::product_wait<1>();
        if (b == 0 && held >= 0) release(held, lane);
      }
      k_left -= layout::gpu::kChunkCodes;
      held = place_.slot;
      place_.advance();
    }
    ptx::product_wait<0>();
    if (held >= 0) release(held, lane);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) ptx::pin(sum[p][i]);
    }
    kernel.finish(work, sum);
  }

  SLIDERQUANT_DEVICE void release(int slot, int lane) const {
    ptx::sync_warp();
    if (lane < Sm90Tile::kCluster) ptx::barrier_arrive_at(empty(slot), lane);
  }

  char* shared_;
  RingPlace<kStages> place_;
};

// Of part p of warp `warp`: the first of its 16 channels.
SLIDERQUANT_DEVICE int sm90_channel(const Sm90Work& work, int warp, int p) {
  constexpr int kGroupWarps = Sm90Tile::kConsumers / 2;
  const int panel = (warp / kGroupWarps * Sm90Tile::kParts + p) * kGroupWarps + warp % kGroupWarps;
  return work.n0 + panel * layout::gpu::kPanelRows;
}

// Writes y [m, n], of 16 channels from n0 on, eight tokens after eight tokens from m0 on, that lanes hold as
// fragment::c has it.
//
// As 16-bit floats: each lane writes four neighbouring channels of one token, and four lanes side by side a whole sector
// of 32 bytes.
template <Float kType>
class HalvesWriter {
 public:
  SLIDERQUANT_DEVICE HalvesWriter(uint16_t* y, int64_t m, int64_t n, int m0, int64_t n0, int lane)
      : n_(n), odd_(lane % 2 != 0) {
    const auto place = fragment::matrix(lane, 0);
    const int channel = odd_ ? fragment::kColumns + place.column - 2 : place.column;
    y_gl_wr_ = y + (m0 + place.row) * n + n0 + channel;
    tokens_ = static_cast<int>(m) - m0 - place.row;
    channels_ = static_cast<int>(n - n0) - channel;
  }

  // The j-th eight tokens.
  SLIDERQUANT_DEVICE void write(int j, const float (&v)[4]) {
    // Rows become columns: two neighbouring channels of one token, and those eight channels further.
    const uint32_t near = ptx::transpose(ptx::pack2<kType>(v[0], v[1]));
    const uint32_t far = ptx::transpose(ptx::pack2<kType>(v[2], v[3]));
    // Two lanes share out four of the near ones and four of the far ones.
    const uint32_t other = ptx::shuffle_xor(odd_ ? near : far, 1);
    const Vec2 four = {{odd_ ? other : near, odd_ ? far : other}};
    if (fragment::kColumns * j < tokens_ && channels_ > 0) {
      if (n_ % 4 == 0) {
        ptx::store(reinterpret_cast<Vec2*>(y_gl_wr_), four);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < channels_) ptx::store(y_gl_wr_ + i, static_cast<uint16_t>(four.v[i / 2] >> 16 * (i % 2)));
        }
      }
    }
    y_gl_wr_ += fragment::kColumns * n_;
  }

 private:
  int64_t n_;
  bool odd_;
  uint16_t* y_gl_wr_;
  int tokens_, channels_;  // that are left, from the lane's own on
};

// As 32-bit values: eight lanes write eight neighbouring channels.
template <class T>
class WordsWriter {
 public:
  SLIDERQUANT_DEVICE WordsWriter(T* y, int64_t m, int64_t n, int m0, int64_t n0, int lane) : n_(n) {
    const auto place = fragment::c(lane, 0);
    y_gl_wr_ = y + (m0 + place.column) * n + n0 + place.row;
    tokens_ = static_cast<int>(m) - m0 - place.column;
    channels_ = static_cast<int>(n - n0) - place.row;
  }

  SLIDERQUANT_DEVICE void write(int j, const T (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto first = fragment::c(0, 0), place = fragment::c(0, i);
      const int token = place.column - first.column, channel = place.row - first.row;
      if (fragment::kColumns * j + token >= tokens_ || channel >= channels_) continue;
      ptx::store(y_gl_wr_ + token * n_ + channel, v[i]);
    }
    y_gl_wr_ += fragment::kColumns * n_;
  }

 private:
  int64_t n_;
  T* y_gl_wr_;
  int tokens_, channels_;
};

}  // namespace sliderquant::cuda
