// From checkpoint packing to the layouts of the CPU kernels, and the sums that integer products need. For every
// instruction set.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "api.h"
#include "blocking.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

using layout::Family;

// Periods of a row that move together, side by side in vector registers: a cache line of words.
constexpr int kRun = 16;

template <int Words>
struct Run {
  uint32_t word[Words][kRun];

  // Those from period p on; beyond the end of the row they are zero codes.
  SLIDERQUANT_INLINE void load(const uint32_t* row, int64_t p, int64_t count) {
    for (int d = 0; d < Words; ++d) {
      for (int i = 0; i < kRun; ++i) word[d][i] = i < count ? row[(p + i) * Words + d] : 0;
    }
  }
};

// Bits that move as one piece from the checkpoint's order to the kernel's.
struct Move {
  uint32_t mask;  // of the piece, at bit 0
  int from_word, from_shift, to_word, to_shift;
};

template <Family family, int bits>
struct Moves {
  Move all[96] = {};
  int count = 0;

  constexpr Moves() {
    int end = -1;  // the kernel bit that would extend the piece
    for (int from = 0; from < 32 * layout::period_words(bits); ++from) {
      const int to = layout::kernel_bit(family, bits, from / bits, from % bits);
      if (to == end && to % 32 != 0 && from % 32 != 0) {
        all[count - 1].mask = all[count - 1].mask << 1 | 1;
      } else {
        all[count++] = {1, from / 32, from % 32, to / 32, to % 32};
      }
      end = to + 1;
    }
  }
};

template <Family family, int bits>
void repack_panel(const Repack& a, int64_t panel) {
  constexpr int kWords = layout::period_words(bits);
  constexpr Moves<family, bits> moves;
  const int64_t periods = a.k / layout::period_codes(bits), n0 = panel * layout::kPanelRows;
  const int64_t rows = std::min<int64_t>(layout::kPanelRows, a.n - n0);
  for (int64_t p = 0; p < periods; p += kRun) {
    const int64_t count = std::min<int64_t>(kRun, periods - p);
    uint32_t tile[kWords][kRun][layout::kPanelRows] = {};  // the lanes of a panel are neighbours in memory
    for (int64_t lane = 0; lane < rows; ++lane) {
      Run<kWords> from, to = {};
      from.load(a.stream + (n0 + lane) * layout::row_words(bits, a.k), p, count);
      cpu::unroll<moves.count>([&]<int I>() SLIDERQUANT_INLINE {
        constexpr Move move = moves.all[I];
        for (int i = 0; i < kRun; ++i) {
          to.word[move.to_word][i] |= (from.word[move.from_word][i] >> move.from_shift & move.mask) << move.to_shift;
        }
      });
      for (int d = 0; d < kWords; ++d) {
        for (int i = 0; i < kRun; ++i) tile[d][i][lane] = to.word[d][i];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int d = 0; d < kWords; ++d) {
        std::memcpy(a.packed + layout::word_index(bits, a.k, n0, p + i, d), tile[d][i], sizeof tile[d][i]);
      }
    }
  }
}

void repack_panels(const Repack& a, int64_t begin, int64_t end) {
  layout::with_bits(a.bits, [&](auto bits) {
    for (int64_t panel = begin; panel < end; ++panel) {
      if (a.pairs) {
        repack_panel<Family::kPairs, bits>(a, panel);
      } else {
        repack_panel<Family::kQuads, bits>(a, panel);
      }
    }
  });
}

template <int bits>
int32_t row_sum(const uint32_t* row, int64_t k) {
  constexpr int kWords = layout::period_words(bits);
  const int64_t periods = k / layout::period_codes(bits);
  uint32_t sum[kRun] = {};
  for (int64_t p = 0; p < periods; p += kRun) {
    Run<kWords> from;
    from.load(row, p, std::min<int64_t>(kRun, periods - p));
    cpu::unroll<layout::period_codes(bits)>([&]<int J>() SLIDERQUANT_INLINE {
      constexpr int kWord = J * bits / 32, kShift = J * bits % 32, kNext = kShift + bits > 32 ? 1 : 0;
      for (int i = 0; i < kRun; ++i) {
        uint32_t code = from.word[kWord][i] >> kShift;
        if (kNext) code |= from.word[kWord + kNext][i] << (32 - kShift) % 32;
        sum[i] += code & ((1u << bits) - 1);
      }
    });
  }
  return static_cast<int32_t>(std::accumulate(sum, sum + kRun, 0u));
}

void sum_rows(const ColumnSums& a, int64_t begin, int64_t end) {
  layout::with_bits(a.bits, [&](auto bits) {
    for (int64_t n = begin; n < end; ++n) a.sums[n] = row_sum<bits>(a.stream + n * layout::row_words(bits, a.k), a.k);
  });
}

}  // namespace

void repack(const Repack& a, Parallel parallel) {
  parallel_for(parallel, layout::panels(a.n), 1, [&](int64_t begin, int64_t end) { repack_panels(a, begin, end); });
}

void column_sums(const ColumnSums& a, Parallel parallel) {
  parallel_for(parallel, a.n, 64, [&](int64_t begin, int64_t end) { sum_rows(a, begin, end); });
}

}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
