// Instructions that C++ has no name for, one thin function each. Every one exists twice: as inline PTX, and for tests
// as plain C++ that computes the same on the host. What needs other threads goes there through `host::`, which the
// runner of the test implements (tests/cuda_runner.h).
//
// Device code reaches global memory through load, store and cp_async alone, so that the runner sees every access.
#pragma once

#include <cstdint>
#include <cstring>

#include "../numeric.h"
#include "../portability.h"
#include "fragments.h"

#ifdef __CUDACC__
#define SLIDERQUANT_DEVICE __device__ __forceinline__
#else
#define SLIDERQUANT_DEVICE inline
#endif

namespace sliderquant::cuda {

constexpr int kWarp = 32;

struct alignas(16) Vec4 {
  uint32_t v[4];
};
struct alignas(8) Vec2 {
  uint32_t v[2];
};

#ifdef __CUDACC__

namespace ptx {

// d += a x b with m16n8k16, operands of kType, sums in fp32.
template <Float kType>
SLIDERQUANT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kType != Float::kFp32, "the operands are 16-bit");
  if constexpr (kType == Float::kFp16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// d += a x b with m16n8k32, unsigned or signed bytes, exact in 32 bits.
template <bool kSignedA, bool kSignedB>
SLIDERQUANT_DEVICE void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define SLIDERQUANT_MMA_INT8(TYPE_A, TYPE_B)                                                                       \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." TYPE_A "." TYPE_B ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
      "{%8, %9}, {%0, %1, %2, %3};"                                                                                \
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kSignedA && kSignedB) {
    SLIDERQUANT_MMA_INT8("s8", "s8");
  } else if constexpr (kSignedA) {
    SLIDERQUANT_MMA_INT8("s8", "u8");
  } else if constexpr (kSignedB) {
    SLIDERQUANT_MMA_INT8("u8", "s8");
  } else {
    SLIDERQUANT_MMA_INT8("u8", "u8");
  }
#undef SLIDERQUANT_MMA_INT8
}

SLIDERQUANT_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 (16 bytes) of matrix l / 8.
SLIDERQUANT_DEVICE void ldmatrix(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// Where in L2 what a copy brings shall stand: in line for eviction before all else (weights, read once), or as usual.
SLIDERQUANT_DEVICE uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

SLIDERQUANT_DEVICE uint64_t evict_normal() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes from global to shared memory past the registers, there after cp_async_wait; zeros where not exists, from an
// address of the tensor all the same.
SLIDERQUANT_DEVICE void cp_async(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(exists ? 16 : 0)
               : "memory");
}

SLIDERQUANT_DEVICE void cp_async(void* shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "l"(policy)
               : "memory");
}

SLIDERQUANT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies of all but the last kPending commits.
template <int kPending>
SLIDERQUANT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

SLIDERQUANT_DEVICE void sync_threads() { __syncthreads(); }
SLIDERQUANT_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
SLIDERQUANT_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFF, value, lane);
}

template <class T>
SLIDERQUANT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFF, value, mask);
}

// Any function of three bits, bit by bit: kTable is that function of 0xF0, 0xCC and 0xAA.
template <int kTable>
SLIDERQUANT_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Byte i of the result is byte (selector >> 4 * i) & 7 of {b, a}.
SLIDERQUANT_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// a + b for two 16-bit floats each.
template <Float kType>
SLIDERQUANT_DEVICE uint32_t add2(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (kType == Float::kFp16) {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  } else {
    // sm_80 knows bf16 sums as a * 1 + b alone.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3F803F80), "r"(b));
  }
  return d;
}

// The two 16-bit floats of a register, lower one first, and the register of two floats, each rounded once.
template <Float kType>
SLIDERQUANT_DEVICE void widen2(uint32_t pair, float& low, float& high) {
  if constexpr (kType == Float::kFp16) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
  } else {
    low = bits_to_float(pair << 16);
    high = bits_to_float(pair & 0xFFFF0000);
  }
}

template <Float kType>
SLIDERQUANT_DEVICE uint32_t narrow2(float low, float high) {
  uint32_t pair;
  if constexpr (kType == Float::kFp16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// a / b, wrong by two units of the last place at most.
SLIDERQUANT_DEVICE float divide_fast(float a, float b) {
  float quotient;
  asm("div.approx.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
}

// Read-only data of global memory.
template <class T>
SLIDERQUANT_DEVICE T load(const T* global) {
  return __ldg(global);
}

SLIDERQUANT_DEVICE Vec4 load(const Vec4* global) {
  const uint4 held = __ldg(reinterpret_cast<const uint4*>(global));
  return {{held.x, held.y, held.z, held.w}};
}

// What this grid does not read again.
template <class T>
SLIDERQUANT_DEVICE T load_once(const T* global) {
  return __ldcs(global);
}

template <class T>
SLIDERQUANT_DEVICE void store(T* global, T value) {
  *global = value;
}

SLIDERQUANT_DEVICE uint32_t atomic_add(uint32_t* global, uint32_t value) { return atomicAdd(global, value); }

SLIDERQUANT_DEVICE void red_add(float* global, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "f"(value) : "memory");
}

}  // namespace ptx

#else

// What the runner of a test implements; each acts for the thread that calls it.
namespace host {

// Returns when all 32 lanes have called it under this name; compute has then been given all their operands.
void warp_collective(const char* name, void* operands, void (*compute)(void* const* operands));
void sync_threads();
void cp_async(void* shared, const void* global, bool exists);
void cp_async_commit();
void cp_async_wait(int pending);
int lane();
// Ends the test unless these bytes lie in a buffer of the kernel and are aligned to their size.
void check_global(const void* address, int bytes, bool write);
void check_shared(const void* address, int bytes);

}  // namespace host

namespace ptx {

template <class Sum, class Operand>
struct MmaOperands {
  Sum* d;
  const uint32_t* a;
  uint32_t b[2];

  // Element i of registers of kBits each.
  template <int kBits>
  static uint32_t element(const uint32_t* registers, int i) {
    constexpr int per = fragment::per_register(kBits);
    return registers[i / per] >> (kBits * (i % per)) & ((1u << kBits) - 1);
  }

  // Exact products, summed in Operand, rounded once per step of the depth as the hardware may.
  template <int kBits, class ConvertA, class ConvertB>
  static void multiply(void* const* lanes, ConvertA convert_a, ConvertB convert_b) {
    constexpr int depth = fragment::depth(kBits);
    Operand a[fragment::kRows][depth], b[depth][fragment::kColumns];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& held = *static_cast<const MmaOperands*>(lanes[lane]);
      for (int i = 0; i < 4 * fragment::per_register(kBits); ++i) {
        const auto place = fragment::a(kBits, lane, i);
        a[place.row][place.column] = convert_a(element<kBits>(held.a, i));
      }
      for (int i = 0; i < 2 * fragment::per_register(kBits); ++i) {
        const auto place = fragment::b(kBits, lane, i);
        b[place.row][place.column] = convert_b(element<kBits>(held.b, i));
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& held = *static_cast<const MmaOperands*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const auto place = fragment::c(lane, i);
        Operand sum = held.d[i];
        for (int k = 0; k < depth; ++k) sum += a[place.row][k] * b[k][place.column];
        held.d[i] = static_cast<Sum>(sum);
      }
    }
  }
};

template <Float kType>
double widen(uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  return kType == Float::kFp16 ? fp16_to_float(half) : bf16_to_float(half);
}

template <Float kType>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kType != Float::kFp32, "the operands are 16-bit");
  using Operands = MmaOperands<float, double>;
  Operands operands = {d, a, {b0, b1}};
  host::warp_collective("mma", &operands, [](void* const* lanes) {
    Operands::multiply<16>(lanes, widen<kType>, widen<kType>);
  });
}

template <bool kSigned>
int64_t widen_byte(uint32_t bits) {
  return kSigned ? static_cast<int8_t>(bits) : static_cast<int64_t>(bits);
}

template <bool kSignedA, bool kSignedB>
void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using Operands = MmaOperands<int32_t, int64_t>;
  Operands operands = {d, a, {b0, b1}};
  host::warp_collective("mma_int8", &operands, [](void* const* lanes) {
    Operands::multiply<8>(lanes, widen_byte<kSignedA>, widen_byte<kSignedB>);
  });
}

inline void ldmatrix(uint32_t (&d)[4], const void* row) {
  struct Operands {
    uint32_t* d;
    const void* row;
  } operands = {d, row};
  host::check_shared(row, 16);
  host::warp_collective("ldmatrix", &operands, [](void* const* lanes) {
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int r = 0; r < 4; ++r) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const auto place = fragment::matrix(lane, i);
          const void* from = static_cast<const Operands*>(lanes[8 * r + place.row])->row;
          pair[i] = static_cast<const uint16_t*>(from)[place.column];
        }
        static_cast<const Operands*>(lanes[lane])->d[r] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
}

inline uint64_t evict_first() { return 0; }
inline uint64_t evict_normal() { return 0; }

inline void cp_async(void* shared, const void* global, bool exists) {
  host::check_global(global, 16, false);
  host::check_shared(shared, 16);
  host::cp_async(shared, global, exists);
}

inline void cp_async(void* shared, const void* global, uint64_t) { cp_async(shared, global, true); }

inline void cp_async_commit() { host::cp_async_commit(); }

template <int kPending>
void cp_async_wait() {
  host::cp_async_wait(kPending);
}

inline void sync_threads() { host::sync_threads(); }
inline void sync_warp() {
  host::warp_collective("sync_warp", nullptr, [](void* const*) {});
}

template <class T>
struct ShuffleOperands {
  T given, taken;
  int from;

  static T exchange(const char* name, T value, int from) {
    ShuffleOperands operands = {value, {}, from};
    host::warp_collective(name, &operands, [](void* const* lanes) {
      for (int lane = 0; lane < kWarp; ++lane) {
        auto& held = *static_cast<ShuffleOperands*>(lanes[lane]);
        held.taken = static_cast<const ShuffleOperands*>(lanes[held.from % kWarp])->given;
      }
    });
    return operands.taken;
  }
};

template <class T>
T shuffle(T value, int lane) {
  return ShuffleOperands<T>::exchange("shuffle", value, lane);
}

template <class T>
T shuffle_xor(T value, int mask) {
  return ShuffleOperands<T>::exchange("shuffle_xor", value, host::lane() ^ mask);
}

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int row = 0; row < 8; ++row) {
    if ((kTable >> row & 1) == 0) continue;
    d |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return d;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    d |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  }
  return d;
}

template <Float kType>
uint32_t add2(uint32_t a, uint32_t b) {
  uint32_t d = 0;
  for (int i = 0; i < 2; ++i) {
    const auto sum = static_cast<float>(widen<kType>(a >> (16 * i)) + widen<kType>(b >> (16 * i)));
    const uint32_t half = kType == Float::kFp16 ? float_to_fp16(sum) : float_to_bf16(sum);
    d |= half << (16 * i);
  }
  return d;
}

template <Float kType>
void widen2(uint32_t pair, float& low, float& high) {
  low = static_cast<float>(widen<kType>(pair));
  high = static_cast<float>(widen<kType>(pair >> 16));
}

template <Float kType>
uint32_t narrow2(float low, float high) {
  const auto narrow = [](float value) -> uint32_t {
    return kType == Float::kFp16 ? float_to_fp16(value) : float_to_bf16(value);
  };
  return narrow(low) | narrow(high) << 16;
}

inline float divide_fast(float a, float b) { return a / b; }

template <class T>
T load(const T* global) {
  host::check_global(global, sizeof(T), false);
  return *global;
}

template <class T>
T load_once(const T* global) {
  return load(global);
}

template <class T>
void store(T* global, T value) {
  host::check_global(global, sizeof(T), true);
  *global = value;
}

inline uint32_t atomic_add(uint32_t* global, uint32_t value) {
  host::check_global(global, sizeof value, true);
  const uint32_t before = *global;
  *global += value;
  return before;
}

inline void red_add(float* global, float value) {
  host::check_global(global, sizeof value, true);
  *global += value;
}

}  // namespace ptx

#endif

}  // namespace sliderquant::cuda
