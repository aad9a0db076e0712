// W*A16 of up to kFixedBits for up to kFixedTokens, in integers, for instruction sets that multiply bytes but have no
// file of their own: making fp32 of every code takes longer than reading it. With more tokens to share it, it does not.
// fixed_point.h says what becomes of x.
//
// Index names: n output channel, panel 32 of them, v one register of a tile, m token, k input channel, q four k of a
// period, i digit.
#include "api.h"
#include "fixed_point.h"
#include "simd.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

using namespace fixed_point;
using layout::kPanelRows;

static_assert(kPanelRows % kTileRows == 0, "a panel must be whole tiles");

// Codes whose products with digits a sum of 16 bits can hold.
template <int Bits>
constexpr int64_t kSumCodes = Bits == 4 ? 32 : Bits == 3 ? 64 : 128;
static_assert(32 * 15 * 128 / 2 <= INT16_MAX && 64 * 7 * 128 / 2 <= INT16_MAX && 128 * 3 * 128 / 2 <= INT16_MAX,
              "a sum takes half of the products of a lane");

// Quad q of a period of the layout kPairs, in the order of pairs_of_quad.
template <int Bits, int Q>
SLIDERQUANT_INLINE inline Words quad_of(const Words* words) {
  if constexpr (Bits != 3) {
    return words[0] >> (Bits * Q) & ((1u << Bits) - 1) * 0x01010101;
  } else {
    const auto join = [](Words first, Words second) { return (first & 0x00070007) | (second & 0x07000700); };
    if constexpr (Q < 6) return join(words[Q / 2] >> (Q % 2 * 3), words[Q / 2] >> (Q % 2 * 3 + 1));
    if constexpr (Q == 6) return join(words[0] >> 6, words[1] << 2);
    // The sixteenth pair: one bit on top of each word, now in the high bytes.
    const Words top = (words[0] >> 7 & 0x01000100) | (words[1] >> 6 & 0x02000200) | (words[2] >> 5 & 0x04000400);
    return join(words[2] >> 6, top);
  }
}

// Token m. False where it holds an infinity or a NaN.
template <int Bits>
bool to_fixed_point(const Wna16& a, int64_t m, const Activations& x) {
  static constexpr Order<Bits> order;
  float* step = x.step + m * x.blocks;
  float* sums = x.sum + m * x.blocks * kDigits;
  for (int64_t k = 0, block = 0, size; k < a.k; k += size, ++block) {
    size = block_size(a, k);
    alignas(64) float values[kBlock];
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < size; ++i) {
      values[i] = load_float(a.x, a.x_type, m * a.x_stride + k + i);
      const float magnitude = std::fabs(values[i]);
      finite &= magnitude < __builtin_inff();
      largest = magnitude > largest ? magnitude : largest;
    }
    if (!finite) return false;
    const int exponent = exponent_of(largest);
    step[block] = std::ldexp(1.0f, exponent - kIntegerBits);
    const float per_step = std::ldexp(1.0f, kIntegerBits - exponent);
    alignas(64) int32_t integers[kBlock];
    for (int64_t i = 0; i < size; ++i) integers[i] = static_cast<int32_t>(std::rint(values[i] * per_step));
    int32_t sum[kDigits] = {};
    for (int64_t i = 0; i < size; i += layout::kBlockCodes) {
      alignas(64) int32_t rest[layout::kBlockCodes];
      for (int j = 0; j < layout::kBlockCodes; ++j) rest[j] = integers[i + order.from[j]];
      for (int d = 0; d < kDigits; ++d) {
        int8_t* digits = x.digits + (m * kDigits + d) * x.k + k + i;
        for (int j = 0; j < layout::kBlockCodes; ++j) {
          const auto digit = static_cast<int8_t>(rest[j]);
          rest[j] = (rest[j] - digit) >> 8;
          sum[d] += digit;
          digits[j] = digit;
        }
      }
    }
    for (int d = 0; d < kDigits; ++d) sums[block * kDigits + d] = static_cast<float>(sum[d]);
  }
  return true;
}

SLIDERQUANT_INLINE inline Words splat_quad(const int8_t* digits) {
  uint32_t quad;
  memcpy(&quad, digits, sizeof quad);
  return splat(quad);
}

// sum += products of `codes` codes of a tile and of the digits of all tokens, which w and digits then have passed.
template <int Bits, int Rows>
SLIDERQUANT_INLINE inline void add_products(const uint32_t*& w, const int8_t*& digits, int64_t digits_stride,
                                            int64_t codes, Pairs (&sum)[Rows][kVectors]) {
  do {  // a loop that may run 0 times takes more registers than there are
    Words words[kVectors][layout::period_words(Bits)];
    load_period<Bits, kVectors>(w, words);
    prefetch_period<Bits>(w);
    unroll<layout::period_codes(Bits) / 4>([&]<int Q>() SLIDERQUANT_INLINE {
      Words quads[kVectors];
      unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE { quads[V] = quad_of<Bits, Q>(words[V]); });
      unroll<Rows>([&]<int I>() SLIDERQUANT_INLINE {
        const Words x_quad = splat_quad(digits + I * digits_stride + 4 * Q);
        unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE {
          add_now(sum[I][V], multiply_bytes(quads[V], x_quad));
        });
      });
    });
    w += layout::period_words(Bits) * kPanelRows;
    digits += layout::period_codes(Bits);
  } while ((codes -= layout::period_codes(Bits)) > 0);
}

// sums [Tokens, kPanelRows]. Where a block takes several sums of 16 bits, wide [Tokens, kDigits, kTileRows] adds them
// up; variables would take registers from them.
template <int Bits, int Tokens>
void fixed_point_panel(const Wna16& a, const Activations& x, int64_t panel, uint32_t* wide, float* sums) {
  constexpr int kRows = Tokens * kDigits;
  const int64_t n0 = panel * kPanelRows, groups = a.k / a.group;
  for (int64_t tile = 0; tile < kPanelRows; tile += kTileRows) {
    const uint32_t* w = a.w + layout::word_index(Bits, a.k, n0, 0, 0) + tile;
    const int8_t* digits = x.digits;
    const float *step = x.step, *digit_sum = x.sum;
    Floats y[Tokens][kVectors];
    clear(y);
    for (int64_t g = 0; g < groups; ++g) {
      prefetch_scale(a, g, n0);
      for (int64_t left = a.group; left > 0; left -= kBlock, ++step, digit_sum += kDigits) {
        // y += what a block's sums of products, row by row, come to.
        const auto finish = [&](const auto& products) SLIDERQUANT_INLINE {
          unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE {
            const auto [scale, zero] = load_scale(a, g, n0 + tile + V * kLanes);
            unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
              Floats total = {};
              unroll<kDigits>([&]<int I>() SLIDERQUANT_INLINE {
                constexpr int kDigit = kDigits - 1 - I;
                const Words of_digit = products.template operator()<M * kDigits + kDigit, V>();
                const Floats zeros = zero * splat(digit_sum[M * x.blocks * kDigits + kDigit]);
                total = total * splat(256.0f) + (__builtin_convertvector(reinterpret_cast<Ints>(of_digit), Floats) - zeros);
              });
              y[M][V] += total * splat(step[M * x.blocks]) * scale;
            });
          });
        };
        const int64_t codes = std::min(kBlock, left);
        Pairs sum[kRows][kVectors];
        if constexpr (kSumCodes<Bits> >= kBlock) {
          clear(sum);
          add_products<Bits>(w, digits, x.k, codes, sum);
          finish([&]<int I, int V>() SLIDERQUANT_INLINE { return add_halves(sum[I][V]); });
        } else {
          for (int64_t done = 0; done < codes; done += kSumCodes<Bits>) {
            clear(sum);
            add_products<Bits>(w, digits, x.k, std::min(kSumCodes<Bits>, codes - done), sum);
            unroll<kRows>([&]<int I>() SLIDERQUANT_INLINE {
              unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE {
                uint32_t* into = wide + I * kTileRows + V * kLanes;
                store(into, (done == 0 ? Words{} : load<Words>(into)) + add_halves(sum[I][V]));
              });
            });
          }
          finish([&]<int I, int V>() SLIDERQUANT_INLINE { return load<Words>(wide + I * kTileRows + V * kLanes); });
        }
      }
    }
    unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
      unroll<kVectors>([&]<int V>() SLIDERQUANT_INLINE { store(sums + M * kPanelRows + tile + V * kLanes, y[M][V]); });
    });
  }
}

template <int Bits>
bool run(const Wna16& a, const Activations& x, Panels of, Parallel parallel) {
  for (int64_t m = 0; m < a.m; ++m) {
    if (!to_fixed_point<Bits>(a, m, x)) return false;
  }
  parallel_for(parallel, of.end - of.begin, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto* sums = scratch.get<float>(a.m * (kPanelRows + kDigits * kTileRows));
    auto* wide = reinterpret_cast<uint32_t*>(sums + a.m * kPanelRows);
    const auto panel_of = a.m == 1 ? fixed_point_panel<Bits, 1> : fixed_point_panel<Bits, kFixedTokens>;
    for (int64_t panel = of.begin + begin; panel < of.begin + end; ++panel) {
      panel_of(a, x, panel, wide, sums);
      for (int64_t m = 0; m < a.m; ++m) store_rows(a, m, panel * kPanelRows, sums + m * kPanelRows);
    }
  });
  return true;
}

}  // namespace

bool fixed_point_wna16(const Wna16& a, Panels of, Parallel parallel) {
  thread_local Scratch digits, floats;
  const int64_t blocks = block_count(a);
  float* step = floats.get<float>(a.m * blocks * (1 + kDigits));
  const Activations x = {digits.get<int8_t>(a.m * kDigits * a.k), step, step + a.m * blocks, a.k, blocks};
  switch (a.bits) {
    case 2: return run<2>(a, x, of, parallel);
    case 3: return run<3>(a, x, of, parallel);
    default: return run<kFixedBits>(a, x, of, parallel);
  }
}

}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
