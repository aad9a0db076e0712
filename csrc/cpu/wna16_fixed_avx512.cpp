// W*A16 for up to four tokens, in integers: vpdpbusd takes twice as many products as vdpbf16ps, and codes as they are,
// where bf16 has to be looked up. Needs AVX512 with VNNI alone.
//
// Index names: n output channel, panel 32 of them, t half of a panel (one register), m token, k input channel,
// block up to 128 of them within a group, q four k of a period, d digit, u independent accumulator chain.
//
// fixed_point.h says what becomes of x.
#include <algorithm>
#include <cmath>
#include <utility>

#include "avx512.h"
#include "expand_quads.h"
#include "fixed_point.h"
#include "wna16_epilogue.h"

namespace sliderquant::cpu::avx512 {
namespace {

using namespace fixed_point;

// Quads of the layout kPairs, unsigned, as ExpandQuads emits those of its own: with 2 and 4 bits they are the same ones.
template <int Bits>
struct UnsignedQuads : ExpandQuads<Bits> {};

template <>
struct UnsignedQuads<3> {
  static constexpr int kQuads = 8;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    Halves v[3], quads;
    unroll<3>([&]<int D>() SLIDERQUANT_INLINE {
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE { v[D][T] = load_half(words + D * layout::kPanelRows, T); });
    });
    const __m512i low = _mm512_set1_epi16(0x0007), high = _mm512_set1_epi16(0x0700);
    const auto join = [&](__m512i first, __m512i second) SLIDERQUANT_INLINE {
      return _mm512_ternarylogic_epi32(first, low, _mm512_and_si512(second, high), 0xEA);  // (first & low) | ..
    };
    unroll<6>([&]<int Q>() SLIDERQUANT_INLINE {
      constexpr int kShift = Q % 2 * 3;
      unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
        const __m512i word = v[Q / 2][T];
        quads[T] = join(_mm512_srli_epi16(word, kShift), _mm512_srli_epi16(word, kShift + 1));
      });
      emit.template operator()<Q>(quads);
    });
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      quads[T] = join(_mm512_srli_epi16(v[0][T], 6), _mm512_slli_epi16(v[1][T], 2));
    });
    emit.template operator()<6>(quads);
    // The sixteenth pair: one bit on top of each word, now in the high bytes. 0xEA is (a & b) | c.
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      const __m512i one = _mm512_and_si512(_mm512_srli_epi16(v[0][T], 7), _mm512_set1_epi16(0x0100));
      const __m512i two =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(v[1][T], 6), _mm512_set1_epi16(0x0200), one, 0xEA);
      const __m512i three =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(v[2][T], 5), _mm512_set1_epi16(0x0400), two, 0xEA);
      quads[T] = join(_mm512_srli_epi16(v[2][T], 6), three);
    });
    emit.template operator()<7>(quads);
  }
};

template <>
struct UnsignedQuads<8> {
  static constexpr int kQuads = 1;
  template <class Emit>
  SLIDERQUANT_INLINE void operator()(const uint32_t* words, Emit&& emit) const {
    emit.template operator()<0>(Halves{load_half(words, 0), load_half(words, 1)});
  }
};

SLIDERQUANT_INLINE inline __m512 load_values(const uint16_t* x, Float type) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return type == Float::kFp16 ? _mm512_cvtph_ps(half)
                              : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int Bits>
bool to_fixed_point(const Wna16& a, int64_t m, const Activations& x) {
  static constexpr Order<Bits> order;
  const __m512i from[2] = {_mm512_load_si512(order.from), _mm512_load_si512(order.from + 16)};
  const uint16_t* row = a.x + m * a.x_stride;
  int64_t block = m * x.blocks;
  for (int64_t k = 0, size; k < a.k; k += size, ++block) {
    size = block_size(a, k);
    __m512 largest = _mm512_setzero_ps();
    __mmask16 infinite = 0;
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 value = _mm512_abs_ps(load_values(row + k + i, a.x_type));
      infinite |= _mm512_cmp_ps_mask(value, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
      largest = _mm512_max_ps(largest, value);
    }
    if (infinite != 0) return false;
    const int exponent = exponent_of(_mm512_reduce_max_ps(largest));
    x.step[block] = std::ldexp(1.0f, exponent - kIntegerBits);
    const __m512 per_step = _mm512_set1_ps(std::ldexp(1.0f, kIntegerBits - exponent));
    __m512i sum[kDigits] = {};
    for (int64_t i = 0; i < size; i += layout::kBlockCodes) {
      __m512i value[2];
      unroll<2>([&]<int H>() SLIDERQUANT_INLINE {
        value[H] = _mm512_cvtps_epi32(_mm512_mul_ps(load_values(row + k + i + 16 * H, a.x_type), per_step));
      });
      unroll<2>([&]<int H>() SLIDERQUANT_INLINE {
        __m512i rest = _mm512_permutex2var_epi32(value[0], from[H], value[1]);
        unroll<kDigits>([&]<int D>() SLIDERQUANT_INLINE {
          const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
          rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
          sum[D] = _mm512_add_epi32(sum[D], digit);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(x.digits + (m * kDigits + D) * x.k + k + i + 16 * H),
                           _mm512_cvtepi32_epi8(digit));
        });
      });
    }
    for (int d = 0; d < kDigits; ++d) x.sum[block * kDigits + d] = static_cast<float>(_mm512_reduce_add_epi32(sum[d]));
  }
  return true;
}

SLIDERQUANT_INLINE inline __m512i broadcast_quad(const int8_t* digits) {
  int32_t quad;
  __builtin_memcpy(&quad, digits, sizeof quad);
  return _mm512_set1_epi32(quad);
}

// A panel for Tokens tokens.
template <int Bits, int Tokens>
void fixed_point_panel(const Wna16& a, const Activations& x, int64_t panel) {
  // One token alone would wait for the latency of each product; two chains of more would not stay in registers.
  constexpr int kChains = Tokens > 1 ? 1 : std::min(2, UnsignedQuads<Bits>::kQuads);
  constexpr int kSums = Tokens * kDigits;
  const UnsignedQuads<Bits> expand;
  static_assert(kSums * kTiles * kChains <= 24, "the sums must stay in registers");
  const int64_t n0 = panel * layout::kPanelRows;
  const __mmask16 mask[kTiles] = {tail_mask(n0, a.n), tail_mask(n0 + layout::kVectorRows, a.n)};
  const uint32_t* w = chunk_words<Bits>(a.w, a.k, panel, 0);
  __m512 y[Tokens][kTiles] = {};
  for (int64_t k = 0, block = 0, size; k < a.k; k += size, ++block) {
    size = block_size(a, k);
    const int64_t g = k / a.group;
    prefetch_scale(a, g, n0);
    __m512i sum[kSums][kTiles][kChains];
    unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE {
      unroll<kChains>([&]<int U>() SLIDERQUANT_INLINE { sum[I][0][U] = sum[I][1][U] = _mm512_setzero_si512(); });
    });
    const int8_t* digits = x.digits + k;
    for (int64_t i = 0; i < size; i += layout::period_codes(Bits)) {
      expand(w, [&]<int Q>(const Halves& quads) SLIDERQUANT_INLINE {
        unroll<kSums>([&]<int I>() SLIDERQUANT_INLINE {
          const __m512i x_quad = broadcast_quad(digits + I * x.k + 4 * Q);
          unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
            __m512i& into = sum[I][T][Q % kChains];
            into = _mm512_dpbusd_epi32(into, quads[T], x_quad);
          });
        });
      });
      prefetch_period<Bits>(w);
      w += layout::period_words(Bits) * layout::kPanelRows;
      digits += layout::period_codes(Bits);
    }
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE {
      const int64_t at = g * a.n + n0 + T * layout::kVectorRows;
      const __m512 scale = _mm512_maskz_loadu_ps(mask[T], a.scale + at);
      const __m512 zero = a.zero != nullptr
                              ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask[T], a.zero + at)))
                              : _mm512_set1_ps(1 << (Bits - 1));
      unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
        const int64_t of_token = M * x.blocks + block;
        __m512 total = _mm512_setzero_ps();
        unroll<kDigits>([&]<int I>() SLIDERQUANT_INLINE {
          constexpr int kDigit = kDigits - 1 - I, kSum = M * kDigits + kDigit;
          __m512i products = sum[kSum][T][0];
          if constexpr (kChains == 2) products = _mm512_add_epi32(products, sum[kSum][T][1]);
          const __m512 centred = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x.sum[of_token * kDigits + kDigit]),
                                                  _mm512_cvtepi32_ps(products));
          total = _mm512_fmadd_ps(total, _mm512_set1_ps(256), centred);
        });
        y[M][T] = _mm512_fmadd_ps(_mm512_mul_ps(total, _mm512_set1_ps(x.step[of_token])), scale, y[M][T]);
      });
    });
  }
  unroll<Tokens>([&]<int M>() SLIDERQUANT_INLINE {
    unroll<kTiles>([&]<int T>() SLIDERQUANT_INLINE { store_row(a, M, n0 + T * layout::kVectorRows, y[M][T]); });
  });
}

using RunPanel = void (*)(const Wna16&, const Activations&, int64_t);
using Prepare = bool (*)(const Wna16&, int64_t, const Activations&);

template <int Bits>
std::pair<Prepare, RunPanel> functions_of(int64_t tokens) {
  static constexpr RunPanel table[] = {fixed_point_panel<Bits, 1>, fixed_point_panel<Bits, 2>,
                                       fixed_point_panel<Bits, 3>, fixed_point_panel<Bits, 4>};
  static_assert(std::size(table) == kFixedPointTokens, "a kernel for each number of tokens");
  return {to_fixed_point<Bits>, table[tokens - 1]};
}

}  // namespace

bool fixed_point_wna16(const Wna16& a, Panels of, Parallel parallel) {
  thread_local Scratch digits, floats;
  const int64_t blocks = block_count(a);
  float* step = floats.get<float>(a.m * blocks * (1 + kDigits));
  const Activations x = {digits.get<int8_t>(a.m * kDigits * a.k), step, step + a.m * blocks, a.k, blocks};
  const auto [prepare, run] = layout::with_bits(a.bits, [&](auto bits) { return functions_of<bits>(a.m); });
  for (int64_t m = 0; m < a.m; ++m) {
    if (!prepare(a, m, x)) return false;
  }
  parallel_for(parallel, of.end - of.begin, panel_grain(a.m, a.k), [&, run = run](int64_t begin, int64_t end) {
    for (int64_t panel = of.begin + begin; panel < of.begin + end; ++panel) run(a, x, panel);
  });
  return true;
}

}  // namespace sliderquant::cpu::avx512
