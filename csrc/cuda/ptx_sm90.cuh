// The instructions of sm_90a alone, in the manner of ptx.cuh: barriers in shared memory that count bytes, bulk copies
// that complete on them, and products of a warpgroup (four warps) that run while the warps go on.
//
// A product of a warpgroup takes 64 rows of A from registers, each warp 16 of them as in fragment::a, and B from shared
// memory: kTokens columns, K contiguous, 32 bytes of it. Rows of B stand 128 bytes apart, eight of them in an atom of
// 1 KB, and the 16-byte units of row r of an atom are permuted by an exclusive or with r: the 128-byte swizzle of the
// PTX manual. Sums lie in registers as in fragment::c, eight columns after eight columns.
#pragma once

#include "ptx.cuh"

namespace sliderquant::cuda {

namespace swizzled {

constexpr int kRowBytes = 128;
constexpr int kAtomRows = 8;
constexpr int kAtomBytes = kAtomRows * kRowBytes;
constexpr int kDepthBytes = 32;  // that a product takes of every row

// Where a byte of an operand stands that would stand at `offset` without the permutation.
SLIDERQUANT_HOST_DEVICE constexpr int64_t place(int64_t offset) {
  return offset ^ (offset / kRowBytes % kAtomRows << 4);
}

// The matrix descriptor of rows from `address` in shared memory on: where they begin and how far the atoms are apart,
// in units of 16 bytes, and the kind of swizzle. The leading dimension has no meaning in this layout.
SLIDERQUANT_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address) {
  return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{kAtomBytes >> 4} << 32 | uint64_t{1} << 62;
}

// The same of k so many bytes further on, within 128.
SLIDERQUANT_HOST_DEVICE constexpr uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace swizzled

// How a product of a warpgroup reads its operands: 16-bit floats of either kind, or unsigned bytes.
enum class Operand { kBf16, kFp16, kByte };

#ifdef __CUDACC__

namespace ptx {

SLIDERQUANT_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Between the initialization of barriers and their use by others, bulk copies among them.
SLIDERQUANT_DEVICE void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

SLIDERQUANT_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Also: so many more bytes have to come before the phase ends.
SLIDERQUANT_DEVICE void barrier_arrive(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// The same at the barrier that stands at this place in the shared memory of another block of the cluster.
SLIDERQUANT_DEVICE void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity has ended; phases count from 0, and what comes before them has ended. kCluster: also
// orders what follows behind what other blocks did before they arrived, for which it empties the L1 cache.
template <bool kCluster = false>
SLIDERQUANT_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
#define SLIDERQUANT_TRY_WAIT(SCOPE)                                            \
  asm volatile(                                                                \
      "{\n\t.reg .pred ended;\n\t"                                             \
      "mbarrier.try_wait.parity" SCOPE ".shared::cta.b64 ended, [%1], %2;\n\t" \
      "selp.u32 %0, 1, 0, ended;\n\t}"                                         \
      : "=r"(ended)                                                            \
      : "r"(shared_address(barrier)), "r"(parity)                              \
      : "memory")
  uint32_t ended = 0;
  while (ended == 0) {
    if constexpr (kCluster) {
      SLIDERQUANT_TRY_WAIT(".acquire.cluster");
    } else {
      SLIDERQUANT_TRY_WAIT("");
    }
  }
#undef SLIDERQUANT_TRY_WAIT
}

// So many bytes, a multiple of 16, from global to shared memory; they count as come where they are there.
SLIDERQUANT_DEVICE void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// The same to this place in the shared memory of every block of a cluster of so many, for the barrier of each.
template <int kBlocks>
SLIDERQUANT_DEVICE void bulk_copy_to_cluster(void* shared, const void* global, int bytes, uint64_t* barrier,
                                             uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4, %5;" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)),
      "h"(static_cast<uint16_t>((1 << kBlocks) - 1)), "l"(policy)
      : "memory");
}

// Until all threads of the cluster are here; what they wrote to barriers before is seen behind it.
SLIDERQUANT_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Before products: registers that were written since the last ones may be read by them.
SLIDERQUANT_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SLIDERQUANT_DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last kPending commits are done with their registers and with shared memory.
template <int kPending>
SLIDERQUANT_DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define SLIDERQUANT_SUMS_32                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "       \
  "{%32, %33, %34, %35}, %36, "
#define SLIDERQUANT_SUMS_48                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "        \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "       \
  "{%48, %49, %50, %51}, %52, "
#define SLIDERQUANT_SUMS_64                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "        \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "        \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "       \
  "{%64, %65, %66, %67}, %68, "
#define SLIDERQUANT_8(KIND, D, I)                                                                          \
  KIND(D[I]), KIND(D[I + 1]), KIND(D[I + 2]), KIND(D[I + 3]), KIND(D[I + 4]), KIND(D[I + 5]), KIND(D[I + 6]), \
      KIND(D[I + 7])
#define SLIDERQUANT_32(KIND, D, I)                                                      \
  SLIDERQUANT_8(KIND, D, I), SLIDERQUANT_8(KIND, D, I + 8), SLIDERQUANT_8(KIND, D, I + 16), \
      SLIDERQUANT_8(KIND, D, I + 24)
#define SLIDERQUANT_48(KIND, D, I) \
  SLIDERQUANT_32(KIND, D, I), SLIDERQUANT_8(KIND, D, I + 32), SLIDERQUANT_8(KIND, D, I + 40)
#define SLIDERQUANT_64(KIND, D, I) SLIDERQUANT_32(KIND, D, I), SLIDERQUANT_32(KIND, D, I + 32)
// The predicate, always true: sums are added to.
#define SLIDERQUANT_PRODUCT(SHAPE, TYPES, COUNT, KIND, END)                                              \
  asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"                                      \
               "wgmma.mma_async.sync.aligned." SHAPE TYPES " " SLIDERQUANT_SUMS_##COUNT "add" END ";\n\t}" \
               : SLIDERQUANT_##COUNT(KIND, d, 0)                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

#define SLIDERQUANT_PRODUCT_OF(COUNT, COLUMNS)                                                         \
  if constexpr (kOperand == Operand::kByte) {                                                          \
    SLIDERQUANT_PRODUCT("m64n" COLUMNS "k32", ".s32.u8.u8", COUNT, "+r", "");                          \
  } else if constexpr (kOperand == Operand::kFp16) {                                                   \
    SLIDERQUANT_PRODUCT("m64n" COLUMNS "k16", ".f32.f16.f16", COUNT, "+f", ", 1, 1, 0");               \
  } else {                                                                                             \
    SLIDERQUANT_PRODUCT("m64n" COLUMNS "k16", ".f32.bf16.bf16", COUNT, "+f", ", 1, 1, 0");             \
  }

// d += a x b, at some time before product_wait says so. Until then a must stand and d must not be looked at.
template <Operand kOperand, class Sum, int kSums>
SLIDERQUANT_DEVICE void product(Sum (&d)[kSums], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kSums == 32 || kSums == 48 || kSums == 64, "64, 96 or 128 tokens");
  if constexpr (kSums == 32) {
    SLIDERQUANT_PRODUCT_OF(32, "64")
  } else if constexpr (kSums == 48) {
    SLIDERQUANT_PRODUCT_OF(48, "96")
  } else {
    SLIDERQUANT_PRODUCT_OF(64, "128")
  }
}

#undef SLIDERQUANT_PRODUCT_OF
#undef SLIDERQUANT_PRODUCT
#undef SLIDERQUANT_64
#undef SLIDERQUANT_48
#undef SLIDERQUANT_32
#undef SLIDERQUANT_8
#undef SLIDERQUANT_SUMS_64
#undef SLIDERQUANT_SUMS_48
#undef SLIDERQUANT_SUMS_32

// Tells the compiler that a register changes here. It must neither read sums before the last product_wait nor make the
// operand of a product after the product_fence.
SLIDERQUANT_DEVICE void pin(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
SLIDERQUANT_DEVICE void pin(int32_t& sum) { asm volatile("" : "+r"(sum)::"memory"); }
SLIDERQUANT_DEVICE void pin(uint32_t& operand) { asm volatile("" : "+r"(operand)::"memory"); }

// So many registers per thread from here on, for all warps of a warpgroup: fewer than the grid began with, or more.
template <int kRegisters>
SLIDERQUANT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SLIDERQUANT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 8 x 8 16-bit elements in the order of fragment::matrix, rows for columns.
SLIDERQUANT_DEVICE uint32_t transpose(uint32_t a) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// Two floats rounded to 16 bits, the first one in the lower half.
template <Float kType>
SLIDERQUANT_DEVICE uint32_t pack2(float low, float high) {
  uint32_t d;
  if constexpr (kType == Float::kFp16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  }
  return d;
}

// a * (high + low) for two 16-bit floats each, where low is what high leaves over: rounded as a * high + a * low, of
// which the second product is small.
template <Float kType>
SLIDERQUANT_DEVICE uint32_t scale2(uint32_t a, uint32_t high, uint32_t low) {
  uint32_t d;
  if constexpr (kType == Float::kFp16) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(low));
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(d) : "r"(a), "r"(high));
  } else {
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(low));
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(d) : "r"(a), "r"(high));
  }
  return d;
}

SLIDERQUANT_DEVICE Vec4 load_vector(const Vec4* global) {
  const uint4 held = __ldg(reinterpret_cast<const uint4*>(global));
  return {{held.x, held.y, held.z, held.w}};
}

// A grid may begin before the one ahead of it in its stream has ended, and waits for that here; the one ahead may say
// that it can begin.
SLIDERQUANT_DEVICE void wait_for_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
SLIDERQUANT_DEVICE void let_next_grid_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// What the grid ahead has written, behind the wait for it: not read-only while this grid runs, as `load` takes it to be.
SLIDERQUANT_DEVICE float load_of_grid_ahead(const float* global) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(__cvta_generic_to_global(global)) : "memory");
  return value;
}

}  // namespace ptx

#else

// One warp's part of a product, to be computed by the runner at a time of its choice.
struct WarpProduct {
  struct Lane {
    void* d;
    const uint32_t* a;
  } lanes[kWarp];
  uint64_t b;  // descriptor
  void (*compute)(const WarpProduct&);
};

namespace host {

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_fence();
void barrier_arrive(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity);
void barrier_arrive_at(uint64_t* barrier, int rank);
void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier);
void bulk_copy_to_cluster(void* shared, const void* global, int bytes, uint64_t* barrier, int blocks);
void sync_cluster();
void product(const WarpProduct& product);
void product_fence();
void product_commit();
void product_wait(int pending);
uint32_t shared_address(const void* shared);
// What bulk copies have brought to these bytes; ends the test where anything else has written there since.
const unsigned char* read_copied(uint32_t address, int bytes);
void wait_for_grid();

}  // namespace host

namespace ptx {

inline uint32_t shared_address(const void* shared) { return host::shared_address(shared); }

inline void barrier_init(uint64_t* barrier, int arrivals) {
  host::check_shared(barrier, sizeof *barrier);
  host::barrier_init(barrier, arrivals);
}
inline void barrier_fence() { host::barrier_fence(); }
inline void barrier_arrive(uint64_t* barrier) { host::barrier_arrive(barrier, 0); }
inline void barrier_arrive(uint64_t* barrier, int bytes) { host::barrier_arrive(barrier, bytes); }
template <bool kCluster = false>
void barrier_wait(uint64_t* barrier, uint32_t parity) {
  host::barrier_wait(barrier, parity);
}
inline void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier, uint64_t) {
  host::bulk_copy(shared, global, bytes, barrier);
}

inline void barrier_arrive_at(uint64_t* barrier, int rank) { host::barrier_arrive_at(barrier, rank); }
template <int kBlocks>
void bulk_copy_to_cluster(void* shared, const void* global, int bytes, uint64_t* barrier, uint64_t) {
  host::bulk_copy_to_cluster(shared, global, bytes, barrier, kBlocks);
}
inline void sync_cluster() { host::sync_cluster(); }

inline void product_fence() {
  host::warp_collective("product_fence", nullptr, [](void* const*) { host::product_fence(); });
}
inline void product_commit() {
  host::warp_collective("product_commit", nullptr, [](void* const*) { host::product_commit(); });
}
template <int kPending>
void product_wait() {
  host::warp_collective("product_wait", nullptr, [](void* const*) { host::product_wait(kPending); });
}

// The bits of an operand as what they stand for.
template <Operand kOperand>
auto operand_value(uint32_t bits) {
  if constexpr (kOperand == Operand::kByte) {
    return static_cast<int64_t>(bits);
  } else {
    return widen<kOperand == Operand::kFp16 ? Float::kFp16 : Float::kBf16>(bits);
  }
}

// 16 rows of a product, B read as its descriptor says.
template <Operand kOperand, class Sum, int kSums>
void compute_product(const WarpProduct& product) {
  constexpr int bits = kOperand == Operand::kByte ? 8 : 16, depth = fragment::depth(bits), columns = 2 * kSums;
  using Exact = decltype(operand_value<kOperand>(0));
  Exact a[fragment::kRows][depth], b[columns][depth];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4 * fragment::per_register(bits); ++i) {
      const auto place = fragment::a(bits, lane, i);
      const uint32_t held = product.lanes[lane].a[i / fragment::per_register(bits)];
      a[place.row][place.column] =
          operand_value<kOperand>(held >> bits * (i % fragment::per_register(bits)) & ((1u << bits) - 1));
    }
  }
  const auto field = [&](int at, int width) { return static_cast<uint32_t>(product.b >> at & ((1u << width) - 1)); };
  const uint32_t start = field(0, 14) << 4, stride = field(32, 14) << 4;
  for (int column = 0; column < columns; ++column) {
    for (int unit = 0; unit < swizzled::kDepthBytes / 16; ++unit) {
      const uint32_t row = start + static_cast<uint32_t>(column / 8) * stride + column % 8 * swizzled::kRowBytes;
      // The exclusive or is one of address bits, wherever the operand begins.
      const auto address = static_cast<uint32_t>(swizzled::place(row + 16 * static_cast<uint32_t>(unit)));
      const unsigned char* bytes = host::read_copied(address, 16);
      for (int k = 0; k < depth / 2; ++k) {
        uint32_t element = bytes[k * bits / 8];
        if (bits == 16) element |= static_cast<uint32_t>(bytes[2 * k + 1]) << 8;
        b[column][unit * depth / 2 + k] = operand_value<kOperand>(element);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* d = static_cast<Sum*>(product.lanes[lane].d);
    for (int i = 0; i < kSums; ++i) {
      const auto place = fragment::c(lane, i % 4);
      Exact sum = d[i];
      for (int k = 0; k < depth; ++k) sum += a[place.row][k] * b[i / 4 * fragment::kColumns + place.column][k];
      d[i] = static_cast<Sum>(sum);
    }
  }
}

template <Operand kOperand, class Sum, int kSums>
void product(Sum (&d)[kSums], const uint32_t (&a)[4], uint64_t b) {
  struct Operands {
    Sum* d;
    const uint32_t* a;
    uint64_t b;
  } operands = {d, a, b};
  host::warp_collective("product", &operands, [](void* const* lanes) {
    WarpProduct product = {};
    product.b = static_cast<const Operands*>(lanes[0])->b;
    product.compute = compute_product<kOperand, Sum, kSums>;
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& held = *static_cast<const Operands*>(lanes[lane]);
      product.lanes[lane] = {held.d, held.a};
      if (held.b != product.b) product.b = 0;  // the runner refuses it
    }
    host::product(product);
  });
}

inline void pin(float&) {}
inline void pin(int32_t&) {}
inline void pin(uint32_t&) {}

template <int kRegisters>
void give_registers() {
  host::warp_collective("give_registers", nullptr, [](void* const*) {});
}
template <int kRegisters>
void take_registers() {
  host::warp_collective("take_registers", nullptr, [](void* const*) {});
}

inline uint32_t transpose(uint32_t a) {
  struct Operands {
    uint32_t given, taken;
  } operands = {a, 0};
  host::warp_collective("transpose", &operands, [](void* const* lanes) {
    uint16_t elements[8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 2; ++i) {
        const auto place = fragment::matrix(lane, i);
        elements[place.row][place.column] =
            static_cast<uint16_t>(static_cast<const Operands*>(lanes[lane])->given >> 16 * i);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      uint32_t taken = 0;
      for (int i = 0; i < 2; ++i) {
        const auto place = fragment::matrix(lane, i);
        taken |= static_cast<uint32_t>(elements[place.column][place.row]) << 16 * i;
      }
      static_cast<Operands*>(lanes[lane])->taken = taken;
    }
  });
  return operands.taken;
}

template <Float kType>
uint32_t round16(float value) {
  return kType == Float::kFp16 ? float_to_fp16(value) : float_to_bf16(value);
}

template <Float kType>
uint32_t pack2(float low, float high) {
  return round16<kType>(low) | round16<kType>(high) << 16;
}

template <Float kType>
uint32_t scale2(uint32_t a, uint32_t high, uint32_t low) {
  uint32_t d = 0;
  for (int i = 0; i < 2; ++i) {
    const double value = widen<kType>(a >> 16 * i);
    const double rest = widen<kType>(round16<kType>(static_cast<float>(value * widen<kType>(low >> 16 * i))));
    d |= round16<kType>(static_cast<float>(value * widen<kType>(high >> 16 * i) + rest)) << 16 * i;
  }
  return d;
}

inline Vec4 load_vector(const Vec4* global) { return load(global); }

inline void wait_for_grid() { host::wait_for_grid(); }
inline void let_next_grid_begin() {}
inline float load_of_grid_ahead(const float* global) { return load(global); }

}  // namespace ptx

#endif

}  // namespace sliderquant::cuda
