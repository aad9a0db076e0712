// One small kernel body per instruction of ptx.cuh: compiled for every architecture, run on the host by the runner, and
// on a GPU against what the host made of the same inputs. Each is one warp.
#pragma once

#include "../csrc/cuda/ptx.cuh"

namespace sliderquant::cuda::selftest {

// What every body is given: a [32][4], b [32][2] and c [32][4] words and d [32][4] words of output, by lane.
struct Words {
  const uint32_t* a;
  const uint32_t* b;
  const uint32_t* c;
  uint32_t* d;
};

struct Registers {
  uint32_t a[4], b[2], c[4];

  SLIDERQUANT_DEVICE Registers(const Words& words, int lane) {
    for (int i = 0; i < 4; ++i) a[i] = ptx::load(words.a + 4 * lane + i);
    for (int i = 0; i < 2; ++i) b[i] = ptx::load(words.b + 2 * lane + i);
    for (int i = 0; i < 4; ++i) c[i] = ptx::load(words.c + 4 * lane + i);
  }
};

SLIDERQUANT_DEVICE void put(const Words& words, int lane, int i, uint32_t value) {
  ptx::store(words.d + 4 * lane + i, value);
}

template <Float kType>
struct Mma {
  SLIDERQUANT_DEVICE static void run(const Words& words, int lane, char*) {
    const Registers r(words, lane);
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = bits_to_float(r.c[i]);
    ptx::mma<kType>(d, r.a, r.b[0], r.b[1]);
    for (int i = 0; i < 4; ++i) put(words, lane, i, float_to_bits(d[i]));
  }
};

template <bool kSignedA, bool kSignedB>
struct MmaInt8 {
  SLIDERQUANT_DEVICE static void run(const Words& words, int lane, char*) {
    const Registers r(words, lane);
    int32_t d[4];
    for (int i = 0; i < 4; ++i) d[i] = static_cast<int32_t>(r.c[i]);
    ptx::mma_int8<kSignedA, kSignedB>(d, r.a, r.b[0], r.b[1]);
    for (int i = 0; i < 4; ++i) put(words, lane, i, static_cast<uint32_t>(d[i]));
  }
};

struct ldmatrix {
  SLIDERQUANT_DEVICE static void run(const Words& words, int lane, char* shared) {
    // Rows stand in reverse, so that an address is not mistaken for an index.
    char* row = shared + 16 * (kWarp - 1 - lane);
    ptx::cp_async(row, words.a + 4 * lane, ptx::evict_normal());
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::sync_warp();
    uint32_t d[4];
    ptx::ldmatrix(d, row);
    for (int i = 0; i < 4; ++i) put(words, lane, i, d[i]);
  }
};

// Two copies in flight, waited for one after the other; odd lanes' second one is of zeros.
struct cp_async {
  SLIDERQUANT_DEVICE static void run(const Words& words, int lane, char* shared) {
    auto* slots = reinterpret_cast<Vec4*>(shared);
    ptx::cp_async(slots + lane, words.a + 4 * lane, ptx::evict_first());
    ptx::cp_async_commit();
    ptx::cp_async(slots + kWarp + lane, words.c + 4 * lane, lane % 2 == 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    ptx::sync_threads();
    const Vec4 first = slots[kWarp - 1 - lane];
    ptx::cp_async_wait<0>();
    ptx::sync_threads();
    const Vec4 second = slots[kWarp + (kWarp - 1 - lane)];
    for (int i = 0; i < 4; ++i) put(words, lane, i, first.v[i] ^ second.v[i]);
  }
};

struct integers {
  SLIDERQUANT_DEVICE static void run(const Words& words, int lane, char*) {
    const Registers r(words, lane);
    put(words, lane, 0, ptx::shuffle(r.a[0], (lane * 5 + 3) % kWarp));
    put(words, lane, 1, ptx::shuffle_xor(r.a[1], 9));
    put(words, lane, 2, ptx::lop3<0xEA>(r.a[0], r.a[1], r.a[2]));  // a & b | c
    put(words, lane, 3, ptx::prmt(r.a[0], r.a[1], 0x3715));
  }
};

template <Float kType>
struct Add2 {
  SLIDERQUANT_DEVICE static void run(const Words& words, int lane, char*) {
    const Registers r(words, lane);
    for (int i = 0; i < 4; ++i) put(words, lane, i, ptx::add2<kType>(r.a[i], r.c[i]));
  }
};

// Two 16-bit floats to fp32, and their quotient and product with another two back.
template <Float kType>
struct Convert {
  SLIDERQUANT_DEVICE static void run(const Words& words, int lane, char*) {
    const Vec4 a = ptx::load(reinterpret_cast<const Vec4*>(words.a + 4 * lane));
    for (int i = 0; i < 4; ++i) {
      float low, high;
      ptx::widen2<kType>(a.v[i], low, high);
      put(words, lane, i, ptx::narrow2<kType>(low * 1.0009765625f, ptx::divide_fast(high, 2)));
    }
  }
};

// Lanes draw tickets and add them up: whole numbers, so that their sum does not depend on the order.
struct atomics {
  SLIDERQUANT_DEVICE static void run(const Words& words, int lane, char*) {
    if (lane == 0) {
      for (int i = 0; i < 4 * kWarp; ++i) ptx::store(words.d + i, uint32_t{0});
    }
    ptx::sync_warp();
    const uint32_t ticket = ptx::atomic_add(words.d, 1);
    ptx::red_add(reinterpret_cast<float*>(words.d + 1), static_cast<float>(ticket));
  }
};

constexpr int kSharedBytes = 2 * kWarp * 16;

using mma_bf16 = Mma<Float::kBf16>;
using mma_fp16 = Mma<Float::kFp16>;
using mma_s8s8 = MmaInt8<true, true>;
using mma_s8u8 = MmaInt8<true, false>;
using mma_u8s8 = MmaInt8<false, true>;
using mma_u8u8 = MmaInt8<false, false>;
using add2_bf16 = Add2<Float::kBf16>;
using add2_fp16 = Add2<Float::kFp16>;
using convert_bf16 = Convert<Float::kBf16>;
using convert_fp16 = Convert<Float::kFp16>;

#define SLIDERQUANT_PTX_BODIES(VISIT)                                                                         \
  VISIT(mma_bf16) VISIT(mma_fp16) VISIT(mma_s8s8) VISIT(mma_s8u8) VISIT(mma_u8s8) VISIT(mma_u8u8) VISIT(ldmatrix) \
  VISIT(cp_async) VISIT(integers) VISIT(add2_bf16) VISIT(add2_fp16) VISIT(atomics)                                  \
  VISIT(convert_bf16) VISIT(convert_fp16)

}  // namespace sliderquant::cuda::selftest
