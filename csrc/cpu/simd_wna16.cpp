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
#include "fixed_point.h"
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

// Calls emit.template operator()<j>(values) for each k of a period of some registers' channels.
template <int Bits, int Vectors, class Emit>
SLIDERQUANT_INLINE inline void expand(const uint32_t* w, const Lookup<Bits>& lookup, Emit&& emit) {
  Words words[Vectors][layout::period_words(Bits)];
  load_period<Bits, Vectors>(w, words);
  unroll<layout::period_codes(Bits)>([&]<int J>() SLIDERQUANT_INLINE {
    Floats values[Vectors];
    unroll<Vectors>([&]<int V>() SLIDERQUANT_INLINE {
      values[V] = lookup(codes_at<layout::Family::kPairs, Bits, J, 1, 0, !Lookup<Bits>::kTable>(words[V]));
    });
    emit.template operator()<J>(values);
  });
}

// The scale, and the zero point less the middle of the codes, of a panel's channels.
struct PanelScale {
  alignas(64) float scale[kPanelRows];
  alignas(64) float zero[kPanelRows];
};

void load_panel_scale(const Wna16& a, int64_t g, int64_t n0, PanelScale& s) {
  for (int64_t at = 0; at < kPanelRows; at += kLanes) {
    const auto [scale, zero] = load_scale(a, g, n0 + at);
    store(s.scale + at, scale);
    store(s.zero + at, zero - splat(static_cast<float>(1 << (a.bits - 1))));
  }
}

// x of some tokens in fp32, [chunks of k][blocks of tokens][k][token], and for a single block its sums, [group][token].
struct Activations {
  const float* blocks;
  const float* group_sum;
};

// A panel for Tokens tokens, as many channels at a time as registers hold.
template <int Bits, int Tokens>
void direct_panel(const Wna16& a, const Activations& x, int64_t panel, const Lookup<Bits>& lookup, float* sums) {
  // One token alone would wait for the latency of each product.
  constexpr int kWide = kDirectVectors<Bits, Tokens>, kChains = Tokens == 1 ? 8 / kWide : 1;
  const int64_t groups = a.k / a.group, n0 = panel * kPanelRows;
  for (int64_t tile = 0; tile < kPanelRows; tile += kWide * kLanes) {
    const uint32_t* w = a.w + layout::word_index(Bits, a.k, n0, 0, 0) + tile;
    const float* x_k = x.blocks;
    Floats y[Tokens][kWide];
    clear(y);
    for (int64_t g = 0; g < groups; ++g) {
      prefetch_scale(a, g, n0);
      Floats sum[Tokens][kWide][kChains];
      unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE { clear(sum[M]); });
      int64_t left = a.group;
      do {  // a loop that may run 0 times takes more registers than there are
        expand<Bits, kWide>(w, lookup, [&]<int J>(const Floats* values) SLIDERQUANT_INLINE {
          unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
            const Floats x_m = splat(x_k[J * Tokens + M]);
            unroll<kWide>([&]<int V>() SLIDERQUANT_INLINE { sum[M][V][J % kChains] += x_m * values[V]; });
          });
        });
        prefetch_period<Bits>(w);
        w += layout::period_words(Bits) * kPanelRows;
        x_k += layout::period_codes(Bits) * Tokens;
      } while ((left -= layout::period_codes(Bits)) > 0);
      unroll<kWide>([&]<int V>() SLIDERQUANT_INLINE {
        const auto [scale, zero] = load_scale(a, g, n0 + tile + V * kLanes);
        const Floats beyond = zero - splat(static_cast<float>(Lookup<Bits>::kMiddle));
        unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
          Floats total = sum[M][V][0];
          unroll<kChains - 1>([&]<int U>() SLIDERQUANT_INLINE { total += sum[M][V][U + 1]; });
          if (a.zero != nullptr) total -= beyond * splat(x.group_sum[g * Tokens + M]);
          y[M][V] += scale * total;
        });
      });
    }
    unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
      unroll<kWide>([&]<int V>() SLIDERQUANT_INLINE { store(sums + M * kPanelRows + tile + V * kLanes, y[M][V]); });
    });
  }
}

// sums[m, kTileRows] += scale * (expanded [count, kPanelRows] of one group) . x [count, Tokens]
template <int Tokens>
void block_group(const float* expanded, int64_t count, const float* x, const float* scale, float* sums) {
  Floats sum[Tokens][kVectors];
  clear(sum);
  do {  // a loop that may run 0 times takes more registers than there are
    Floats w[kVectors];
    unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE { w[V] = load<Floats>(expanded + V * kLanes); });
    unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
      const Floats x_m = splat(x[M]);
      unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE { sum[M][V] += x_m * w[V]; });
    });
    expanded += kPanelRows;
    x += Tokens;
  } while (--count > 0);
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
  PanelScale s;
  std::fill(sums, sums + a.m * kPanelRows, 0.0f);
  for (int64_t k0 = 0; k0 < a.k; k0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, a.k - k0), part = std::min(a.group, chunk);
    for (int64_t first = 0; first < chunk; first += part) {
      load_panel_scale(a, (k0 + first) / a.group, n0, s);
      for (int64_t k = 0; k < part; k += layout::period_codes(Bits)) {
        unroll<kPanelRows / kLanes>([&]<int V>() SLIDERQUANT_INLINE {
          const Floats zero = load<Floats>(s.zero + V * kLanes);
          expand<Bits, 1>(w + V * kLanes, lookup, [&]<int J>(const Floats* values) SLIDERQUANT_INLINE {
            store(expanded + (k + J) * kPanelRows + V * kLanes, values[0] - zero);
          });
        });
        prefetch_period<Bits>(w);
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
auto direct_panel_of(int64_t tokens, std::integer_sequence<int, Tokens...>) {
  static constexpr decltype(&direct_panel<Bits, 1>) table[] = {direct_panel<Bits, Tokens + 1>...};
  return table[tokens - 1];
}

// Up to here expanding weights into scratch costs more than it saves. With 16 lanes more would also take minutes to
// compile under the sanitizers.
constexpr int kDirectTokens = kLanes == 16 ? 3 : 5;

template <int Bits>
void panels(const Wna16& a, const Activations& x, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  auto* expanded = scratch.get<float>((kChunk + a.m) * kPanelRows);
  float* sums = expanded + kChunk * kPanelRows;
  const Lookup<Bits> lookup;
  for (int64_t panel = begin; panel < end; ++panel) {
    if (a.m <= kDirectTokens) {
      direct_panel_of<Bits>(a.m, std::make_integer_sequence<int, kDirectTokens>{})(a, x, panel, lookup, sums);
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
  if constexpr (kMultipliesBytes) {
    if (a.m <= kFixedTokens && a.bits <= kFixedBits && fixed_point_wna16(a, of, parallel)) return;
  }
  for_super_tokens(a, [&](const Wna16& part) { super_block(part, of, parallel); });
}

}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
