// Vectors for the kernels that are compiled once for each instruction set. SLIDERQUANT_LANES says how many 32-bit lanes
// a register has there, SLIDERQUANT_RUNG in which namespace they live.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef SLIDERQUANT_X86
#include <immintrin.h>
#endif

#include "../args.h"
#include "../layout.h"
#include "blocking.h"

namespace sliderquant::cpu::SLIDERQUANT_RUNG {
namespace {

constexpr int kLanes = SLIDERQUANT_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int16_t Pairs __attribute__((vector_size(4 * kLanes)));  // two in each lane

// A tile: output channels that stand in registers side by side and the tokens that share them. Registers: 24 sums of 32
// with AVX512, 12 of 16 else, beside two of weights and one of a token.
constexpr int kVectors = 2;
constexpr int kTileRows = kVectors * kLanes;
constexpr int kTileTokens = kLanes == 16 ? 12 : 6;
using TokenBlocks = Blocks<kTileTokens>;

// Registers of channels where few tokens meet weights straight from memory: for one token as many as sums need not to
// wait for each other, unless the words of a period take them.
template <int Bits, int Tokens>
constexpr int kDirectVectors = Bits == 3 || Tokens > 1 ? kVectors : std::min(layout::kPanelRows / kLanes, 4);

// W*A16 of few tokens: up to here integers are faster than fp32. Measured; 16 lanes look codes of 4 bits up.
constexpr int kFixedTokens = kLanes == 8 ? 2 : 1, kFixedBits = kLanes == 8 ? 4 : 3;

template <class Vector, class Element>
SLIDERQUANT_INLINE inline Vector load(const Element* from) {
  Vector value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector, class Element>
SLIDERQUANT_INLINE inline void store(Element* to, const Vector& value) {
  memcpy(to, &value, sizeof value);
}

// kLanes bytes, one in each lane. The compiler left to convert them takes them one by one.
SLIDERQUANT_INLINE inline Ints load_bytes(const uint8_t* from) {
#if defined(SLIDERQUANT_X86) && SLIDERQUANT_LANES == 16
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(SLIDERQUANT_X86) && SLIDERQUANT_LANES == 8
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(load<Bytes>(from), Ints);
#endif
}

// Whether one instruction multiplies bytes, with 16-bit sums; SSE2 has none.
constexpr bool kMultipliesBytes = kLanes >= 8;

SLIDERQUANT_INLINE inline Floats splat(float x) { return x - Floats{}; }
SLIDERQUANT_INLINE inline Words splat(uint32_t x) { return x + Words{}; }

// In each lane the sum of the products of two pairs of 16-bit integers, signed, or both below 256.
SLIDERQUANT_INLINE inline Words multiply_pairs(Words a, Words b) {
#if defined(SLIDERQUANT_X86) && SLIDERQUANT_LANES == 16
  return reinterpret_cast<Words>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(SLIDERQUANT_X86) && SLIDERQUANT_LANES == 8
  return reinterpret_cast<Words>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(SLIDERQUANT_X86)
  return reinterpret_cast<Words>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFF) * (b & 0xFFFF) + (a >> 16) * (b >> 16);
#endif
}

// In each half of a lane the sum of two products, of unsigned bytes of a and signed ones of b.
SLIDERQUANT_INLINE inline Pairs multiply_bytes(Words a, Words b) {
#if defined(SLIDERQUANT_X86) && SLIDERQUANT_LANES == 16
  return reinterpret_cast<Pairs>(_mm512_maddubs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(SLIDERQUANT_X86) && SLIDERQUANT_LANES == 8
  return reinterpret_cast<Pairs>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  const auto even = [](Words words) { return reinterpret_cast<Pairs>(words & 0x00FF00FF); };
  const auto extend = [](Pairs bytes) { return (bytes << 8) >> 8; };
  return even(a) * extend(even(b)) + even(a >> 8) * extend(even(b >> 8));
#endif
}

// sum += more, here and now. Left alone the compiler first makes all that is ever to be added, and runs out of registers.
template <class Vector>
SLIDERQUANT_INLINE inline void add_now(Vector& sum, Vector more) {
  Vector next = sum + more;
#ifdef SLIDERQUANT_X86
  asm("" : "+v"(next));
#endif
  sum = next;
}

// The two halves of each lane added up.
SLIDERQUANT_INLINE inline Words add_halves(Pairs sums) {
  return multiply_pairs(reinterpret_cast<Words>(sums), splat(uint32_t{0x00010001}));
}

// Codes j of a period whose words are given, one in each 32-bit lane; with kRepeat = 0x00010001 two, 16 bits apart.
// They are those kShift bits above the place that the layout names. Where codes need not be kMasked, bits above one may
// be anything.
template <layout::Family kFamily, int Bits, int J, uint32_t kRepeat, int kShift, bool kMasked>
SLIDERQUANT_INLINE inline Words codes_at(const Words* words) {
  constexpr auto bit = [](int b) { return layout::kernel_bit(kFamily, Bits, J, b) + kShift; };
  constexpr int kRun = [bit] {  // bits that lie together
    int count = 1;
    while (count < Bits && bit(count) == bit(0) + count) ++count;
    return count;
  }();
  Words codes = words[bit(0) / 32] >> (bit(0) % 32);
  if constexpr (kMasked || kRun < Bits) codes &= ((1u << kRun) - 1) * kRepeat;
  unroll<Bits - kRun>([&]<int B>() SLIDERQUANT_INLINE {
    codes |= (words[bit(B + kRun) / 32] >> (bit(B + kRun) % 32) & kRepeat) << (B + kRun);
  });
  return codes;
}

// Zeros in registers; `= {}` would let an array begin, and stay, in memory.
template <class Vector, int Rows, int Columns>
SLIDERQUANT_INLINE inline void clear(Vector (&values)[Rows][Columns]) {
  unroll<Rows>([&]<int I>() SLIDERQUANT_INLINE {
    unroll<Columns>([&]<int V>() SLIDERQUANT_INLINE { values[I][V] = Vector{}; });
  });
}

// The words of a period of some registers' channels.
template <int Bits, int Vectors>
SLIDERQUANT_INLINE inline void load_period(const uint32_t* w, Words (&words)[Vectors][layout::period_words(Bits)]) {
  unroll<Vectors>([&]<int V>() SLIDERQUANT_INLINE {
    unroll<layout::period_words(Bits)>([&]<int D>() SLIDERQUANT_INLINE {
      words[V][D] = load<Words>(w + D * layout::kPanelRows + V * kLanes);
    });
  });
}

// float_to_bf16 of every lane.
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
SLIDERQUANT_INLINE inline Halves to_bf16(Floats value) {
  const auto bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const Words not_a_number = (bits >> 16) | 0x40;
  return __builtin_convertvector((bits & 0x7FFFFFFF) > 0x7F800000 ? not_a_number : rounded, Halves);
}

SLIDERQUANT_INLINE inline void store_floats(void* y, Float type, int64_t at, Floats value) {
  if (type == Float::kBf16) {
    store(static_cast<uint16_t*>(y) + at, to_bf16(value));
  } else if (type == Float::kFp32) {
    store(static_cast<float*>(y) + at, value);
  } else {
    for (int i = 0; i < kLanes; ++i) store_float(y, type, at + i, value[i]);
  }
}

// What comes later on the way through a panel, of all of its channels: whoever visits the others next finds them near.
template <int Bits>
SLIDERQUANT_INLINE inline void prefetch_period(const uint32_t* w) {
  constexpr int kLine = 64, kLines = 4 * layout::kPanelRows * layout::period_words(Bits) / kLine;
  const char* line = reinterpret_cast<const char*>(w) + kPrefetchBytes;
  unroll<kLines>([&]<int L>() SLIDERQUANT_INLINE { __builtin_prefetch(line + kLine * L); });
}

// Of one register's channels in a group; scale 0 beyond the last channel.
struct GroupScale {
  Floats scale, zero;
};

// Where a panel has fewer channels than the register: `rows` from `at` on. Apart, so that what it writes piece by piece
// into memory stays registers in the loops that rarely call it.
[[gnu::noinline]] inline GroupScale load_scale_of(const Wna16& a, int64_t at, int64_t rows) {
  GroupScale s = {{}, splat(static_cast<float>(1 << (a.bits - 1)))};
  for (int64_t i = 0; i < rows; ++i) {
    s.scale[i] = a.scale[at + i];
    if (a.zero != nullptr) s.zero[i] = a.zero[at + i];
  }
  return s;
}

SLIDERQUANT_INLINE inline GroupScale load_scale(const Wna16& a, int64_t g, int64_t n) {
  const int64_t at = g * a.n + n;
  if (n + kLanes > a.n) [[unlikely]] return load_scale_of(a, at, a.n - n);
  return {load<Floats>(a.scale + at), a.zero == nullptr
                                          ? splat(static_cast<float>(1 << (a.bits - 1)))
                                          : __builtin_convertvector(load_bytes(a.zero + at), Floats)};
}

// Sums of a panel, with the bias, as y[m].
SLIDERQUANT_INLINE inline void store_rows(const Wna16& a, int64_t m, int64_t n0, const float* sums) {
  for (int64_t at = 0; at < layout::kPanelRows && n0 + at < a.n; at += kLanes) {
    const int64_t n = n0 + at;
    if (n + kLanes <= a.n) {
      const Floats sum = load<Floats>(sums + at);
      store_floats(a.y, a.x_type, m * a.n + n, a.bias != nullptr ? sum + load<Floats>(a.bias + n) : sum);
    } else {
      for (int64_t r = 0; n + r < a.n; ++r) {
        store_float(a.y, a.x_type, m * a.n + n + r, sums[at + r] + (a.bias != nullptr ? a.bias[n + r] : 0));
      }
    }
  }
}

}  // namespace
}  // namespace sliderquant::cpu::SLIDERQUANT_RUNG
