// W*A16 in fp32, for every instruction set without a file of its own.
//
// Index names: n output channel, panel 32 of them, v one register of a tile, m token, k input channel, j k within a
// period, g scale group, d word of a period.
//
// Few tokens: codes go from memory straight into the products, less the middle of their range; what the zero point is
// beyond that enters through the group's sum of x. More tokens: a chunk of a panel is expanded once into L1-sized
// scratch, its zero points subtracted, and reused by all of them; x is first converted and packed block by block of
// tokens.
#include "api.h"
#include "simd.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

using layout::kPanelRows;

constexpr int kChunk = 256;  // input channels per expansion: 32 * 256 * 4 bytes, an L1

// From code to code - 2^(bits-1) in fp32. A register that has a lane for each code serves as a table, whose index may
// have any bits above.
template <int Bits>
struct Lookup {
  static constexpr bool kTable = (1 << Bits) <= kLanes && kLanes >= 8;
  static constexpr int kMiddle = 1 << (Bits - 1);
  Floats table{};
  Lookup() {
    for (int i = 0; i < kLanes; ++i) table[i] = static_cast<float>((i & ((1 << Bits) - 1)) - kMiddle);
  }
  SLIDERQUANT_INLINE Floats operator()(Words codes) const {
    if constexpr (kTable) return __builtin_shuffle(table, reinterpret_cast<Ints>(codes));
    return __builtin_convertvector(reinterpret_cast<Ints>(codes) - kMiddle, Floats);
  }
};

// Calls emit.template operator()<j>(values) for each k of a period of one register's channels.
template <int Bits, class Emit>
SLIDERQUANT_INLINE inline void expand(const uint32_t* w, const Lookup<Bits>& lookup, Emit&& emit) {
  Words words[layout::period_words(Bits)];
  unroll<layout::period_words(Bits)>(
      [&]<int D>() SLIDERQUANT_INLINE { words[D] = load<Words>(w + D * kPanelRows); });
  unroll<layout::period_codes(Bits)>([&]<int J>() SLIDERQUANT_INLINE {
    emit.template operator()<J>(
        lookup(codes_at<layout::Family::kPairs, Bits, J, 1, 0, !Lookup<Bits>::kTable>(words)));
  });
}

// Of the channels of a panel; 0 beyond the last one.
struct GroupScale {
  alignas(64) float scale[kPanelRows];
  alignas(64) float zero[kPanelRows];  // zero point - 2^(bits-1)
};

void load_scale(const Wna16& a, int64_t g, int64_t n0, GroupScale& s) {
  const int64_t rows = std::min<int64_t>(kPanelRows, a.n - n0), at = g * a.n + n0;
  uint8_t zeros[kPanelRows] = {};
  if (rows < kPanelRows) s = {};
  memcpy(s.scale, a.scale + at, sizeof(float) * rows);
  if (a.zero != nullptr) memcpy(zeros, a.zero + at, rows);
  const int middle = a.zero != nullptr ? 1 << (a.bits - 1) : 0;
  for (int64_t r = 0; r < kPanelRows; ++r) s.zero[r] = static_cast<float>(zeros[r] - middle);
}

void store_rows(const Wna16& a, int64_t m, int64_t n0, const float* sums) {
  const int64_t rows = std::min<int64_t>(kPanelRows, a.n - n0);
  for (int64_t r = 0; r < rows; ++r) {
    store_float(a.y, a.x_type, m * a.n + n0 + r, sums[r] + (a.bias != nullptr ? a.bias[n0 + r] : 0));
  }
}

// x of some tokens in fp32, [chunks of k][blocks of tokens][k][token], and for a single block its sums, [group][token].
struct Activations {
  const float* blocks;
  const float* group_sum;
};

// The channels [n0 + tile, n0 + tile + kTileRows) of a panel, for all of up to kTileTokens tokens.
template <int Bits, int Tokens>
void direct_tile(const Wna16& a, const Activations& x, int64_t panel, int64_t tile, const Lookup<Bits>& lookup,
                 float* sums) {
  const int64_t groups = a.k / a.group, n0 = panel * kPanelRows;
  const uint32_t* w = a.w + layout::word_index(Bits, a.k, n0, 0, 0) + tile;
  const float* x_k = x.blocks;
  // One token alone would wait for the latency of each product.
  constexpr int kChains = Tokens == 1 ? 8 / kVectors : 1;
  Floats y[Tokens][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Floats sum[Tokens][kVectors][kChains] = {};
    for (int64_t k = 0; k < a.group; k += layout::period_codes(Bits)) {
      unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE {
        unroll<layout::period_words(Bits)>([&]<int D>() SLIDERQUANT_INLINE {
          __builtin_prefetch(reinterpret_cast<const char*>(w + D * kPanelRows + V * kLanes) + kPrefetchBytes);
        });
        expand<Bits>(w + V * kLanes, lookup, [&]<int J>(Floats value) SLIDERQUANT_INLINE {
          unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
            sum[M][V][J % kChains] += splat(x_k[J * Tokens + M]) * value;
          });
        });
      });
      w += layout::period_words(Bits) * kPanelRows;
      x_k += layout::period_codes(Bits) * Tokens;
    }
    GroupScale s;
    load_scale(a, g, n0, s);
    unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
      unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE {
        Floats total = sum[M][V][0];
        unroll<kChains - 1>([&]<int U>() SLIDERQUANT_INLINE { total += sum[M][V][U + 1]; });
        if (a.zero != nullptr) {
          total -= load<Floats>(s.zero + tile + V * kLanes) * splat(x.group_sum[g * Tokens + M]);
        }
        y[M][V] += load<Floats>(s.scale + tile + V * kLanes) * total;
      });
    });
  }
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE {
      store(sums + M * kPanelRows + tile + V * kLanes, y[M][V]);
    });
  });
}

// sums[m, kTileRows] += scale * (expanded [count, kPanelRows] of one group) . x [count, Tokens]
template <int Tokens>
void block_group(const float* expanded, int64_t count, const float* x, const float* scale, float* sums) {
  Floats sum[Tokens][kVectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    Floats w[kVectors];
    unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE { w[V] = load<Floats>(expanded + V * kLanes); });
    unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
      const Floats x_m = splat(x[M]);
      unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE { sum[M][V] += x_m * w[V]; });
    });
    expanded += kPanelRows;
    x += Tokens;
  }
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE {
      float* into = sums + M * kPanelRows + V * kLanes;
      store(into, load<Floats>(into) + load<Floats>(scale + V * kLanes) * sum[M][V]);
    });
  });
}

using BlockGroup = decltype(&block_group<1>);

template <int... Tokens>
BlockGroup block_group_of(int64_t tokens, std::integer_sequence<int, Tokens...>) {
  static constexpr BlockGroup table[] = {block_group<Tokens + 1>...};
  return table[tokens - 1];
}

// A panel for many tokens: sums [m, kPanelRows].
template <int Bits>
void block_panel(const Wna16& a, const Activations& x, int64_t panel, const Lookup<Bits>& lookup, float* expanded,
                 float* sums) {
  const int64_t n0 = panel * kPanelRows;
  const uint32_t* w = a.w + layout::word_index(Bits, a.k, n0, 0, 0);
  GroupScale s;
  std::fill(sums, sums + a.m * kPanelRows, 0.0f);
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0), part = std::min(a.group, chunk);
    for (int64_t first = 0; first < chunk; first += part) {
      load_scale(a, (k0 + first) / a.group, n0, s);
      for (int64_t k = 0; k < part; k += layout::period_codes(Bits)) {
        unroll<kPanelRows / kLanes>([&]<int V>() SLIDERQUANT_INLINE {
          const Floats zero = load<Floats>(s.zero + V * kLanes);
          expand<Bits>(w + V * kLanes, lookup, [&]<int J>(Floats value) SLIDERQUANT_INLINE {
            store(expanded + (k + J) * kPanelRows + V * kLanes, value - zero);
          });
        });
        w += layout::period_words(Bits) * kPanelRows;
      }
      for (int64_t block = 0; block < TokenBlocks::count(a.m); ++block) {
        const int64_t m = TokenBlocks::begin(a.m, block), count = TokenBlocks::begin(a.m, block + 1) - m;
        const BlockGroup run = block_group_of(count, std::make_integer_sequence<int, kTileTokens>{});
        const float* x_block = x.blocks + k0 * a.m + m * chunk + first * count;
        for (int64_t tile = 0; tile < kPanelRows; tile += kTileRows) {
          run(expanded + tile, part, x_block, s.scale + tile, sums + m * kPanelRows + tile);
        }
      }
    }
  }
}

template <int Bits, int... Tokens>
void direct_panel(const Wna16& a, const Activations& x, int64_t panel, const Lookup<Bits>& lookup, float* sums,
                  std::integer_sequence<int, Tokens...>) {
  using Direct = decltype(&direct_tile<Bits, 1>);
  static constexpr Direct table[] = {direct_tile<Bits, Tokens + 1>...};
  for (int64_t tile = 0; tile < kPanelRows; tile += kTileRows) table[a.m - 1](a, x, panel, tile, lookup, sums);
}

constexpr int kDirectTokens = 3;  // up to here expanding weights into scratch costs more than it saves

template <int Bits>
void panels(const Wna16& a, const Activations& x, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  auto* expanded = scratch.get<float>((kChunk + a.m) * kPanelRows);
  float* sums = expanded + kChunk * kPanelRows;
  const Lookup<Bits> lookup;
  for (int64_t panel = begin; panel < end; ++panel) {
    if (a.m <= kDirectTokens) {
      direct_panel<Bits>(a, x, panel, lookup, sums, std::make_integer_sequence<int, kDirectTokens>{});
    } else {
      block_panel<Bits>(a, x, panel, lookup, expanded, sums);
    }
    for (int64_t m = 0; m < a.m; ++m) store_rows(a, m, panel * kPanelRows, sums + m * kPanelRows);
  }
}

void pack_block(const Wna16& a, int64_t begin, int64_t end, float* blocks) {
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0), count = end - begin;
    float* packed = blocks + k0 * a.m + begin * chunk;
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t k = 0; k < chunk; ++k) {
        packed[k * count + m - begin] = load_float(a.x, a.x_type, m * a.x_stride + k0 + k);
      }
    }
  }
}

// The panels given, for up to kSuperTokens tokens.
void super_block(const Wna16& a, Panels of, Parallel parallel) {
  thread_local Scratch pack;
  const int64_t groups = a.k / a.group;
  auto* blocks = pack.get<float>(a.m * (a.k + groups));
  parallel_for(parallel, TokenBlocks::count(a.m), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      pack_block(a, TokenBlocks::begin(a.m, block), TokenBlocks::begin(a.m, block + 1), blocks);
    }
  });
  float* group_sum = blocks + a.m * a.k;
  if (a.m <= kDirectTokens) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t m = 0; m < a.m; ++m) {
        float sum = 0;
        for (int64_t k = g * a.group; k < (g + 1) * a.group; ++k) sum += blocks[k * a.m + m];
        group_sum[g * a.m + m] = sum;
      }
    }
  }
  const Activations x = {blocks, group_sum};
  parallel_for(parallel, of.end - of.begin, 1, [&](int64_t begin, int64_t end) {
    begin += of.begin, end += of.begin;
    layout::with_bits(a.bits, [&](auto bits) { panels<bits>(a, x, begin, end); });
  });
}

}  // namespace

void wna16(const Wna16& a, Panels of, Parallel parallel) {
  for_super_tokens(a, [&](const Wna16& part) { super_block(part, of, parallel); });
}

}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
