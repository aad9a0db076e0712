// The same as ptx_bodies.cuh for ptx_sm90.cuh. Each body is a cluster of two blocks of a warpgroup.
#pragma once

#include "../csrc/cuda/ptx_sm90.cuh"

namespace sliderquant::cuda::selftest90 {

constexpr int kBlocks = 2;
constexpr int kThreads = 4 * kWarp;
constexpr int kTokens = 128;
constexpr int kBarrierPlace = kTokens * swizzled::kRowBytes;
constexpr int kSharedBytes = kBarrierPlace + 2 * 8;
constexpr int kSums = 64;  // of a thread, at most

// What every body is given: a [kThreads][4], b [kTokens][8] and c [kThreads][kSums] words, and d [kBlocks][kThreads]
// [kSums] words of output.
struct Words {
  const uint32_t* a;
  const uint32_t* b;
  const uint32_t* c;
  uint32_t* d;
};

SLIDERQUANT_DEVICE void put(const Words& words, int rank, int thread, int i, uint32_t value) {
  ptx::store(words.d + (rank * kThreads + thread) * kSums + i, value);
}

SLIDERQUANT_DEVICE uint64_t* barrier(char* shared, int i) {
  return reinterpret_cast<uint64_t*>(shared + kBarrierPlace) + i;
}

SLIDERQUANT_DEVICE void make_barriers(char* shared, int thread, int first, int second) {
  if (thread == 0) {
    ptx::barrier_init(barrier(shared, 0), first);
    ptx::barrier_init(barrier(shared, 1), second);
    ptx::barrier_fence();
  }
  ptx::sync_cluster();
}

// Twice d += a x b, with B at the k-th 32 bytes of its rows, k the number of the block plus one.
template <Operand kOperand, class Sum, int kOfThread>
struct Product {
  SLIDERQUANT_DEVICE static void run(const Words& words, int rank, int thread, char* shared) {
    constexpr int kColumns = 2 * kOfThread, kUnits = swizzled::kDepthBytes / 16;
    make_barriers(shared, thread, 1, 1);
    const int at = (rank + 1) * swizzled::kDepthBytes;
    if (thread == 0) ptx::barrier_arrive(barrier(shared, 0), kColumns * swizzled::kDepthBytes);
    if (thread < kColumns) {
      for (int unit = 0; unit < kUnits; ++unit) {
        ptx::bulk_copy(shared + swizzled::place(thread * swizzled::kRowBytes + at + 16 * unit),
                       words.b + 8 * thread + 4 * unit, 16, barrier(shared, 0), ptx::evict_normal());
      }
    }
    Sum d[kOfThread];
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = ptx::load(words.a + 4 * thread + i);
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const uint32_t bits = ptx::load(words.c + kSums * thread + i);
      memcpy(&d[i], &bits, sizeof bits);
    }
    ptx::barrier_wait(barrier(shared, 0), 0);
    const uint64_t b = swizzled::advanced(swizzled::descriptor(ptx::shared_address(shared)), at);
    ptx::product_fence();
    ptx::product<kOperand>(d, a, b);
    ptx::product<kOperand>(d, a, b);
    ptx::product_commit();
    ptx::product_wait<0>();
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      ptx::pin(d[i]);
      uint32_t bits;
      memcpy(&bits, &d[i], sizeof bits);
      put(words, rank, thread, i, bits);
    }
    ptx::sync_cluster();
  }
};

// Each block brings half of a to both, and each thread tells both that it has read.
struct cluster {
  SLIDERQUANT_DEVICE static void run(const Words& words, int rank, int thread, char* shared) {
    constexpr int kHalf = kThreads / 2 * 16;
    make_barriers(shared, thread, 1, kBlocks * kThreads);
    if (thread == 0) {
      ptx::barrier_arrive(barrier(shared, 0), 2 * kHalf);
      ptx::bulk_copy_to_cluster<kBlocks>(shared + rank * kHalf, words.a + rank * kHalf / 4, kHalf, barrier(shared, 0),
                                         ptx::evict_first());
    }
    ptx::barrier_wait(barrier(shared, 0), 0);
    const Vec4 held = reinterpret_cast<const Vec4*>(shared)[kThreads - 1 - thread];
    for (int to = 0; to < kBlocks; ++to) ptx::barrier_arrive_at(barrier(shared, 1), to);
    ptx::barrier_wait(barrier(shared, 1), 0);
    if (thread == 0) {
      ptx::barrier_arrive(barrier(shared, 0), kHalf);
      ptx::bulk_copy(shared, words.b, kHalf, barrier(shared, 0), ptx::evict_normal());
    }
    ptx::barrier_wait(barrier(shared, 0), 1);
    const uint32_t second = reinterpret_cast<const Vec4*>(shared)[thread / 2].v[0];
    for (int i = 0; i < 4; ++i) put(words, rank, thread, i, held.v[i] ^ second);
    ptx::sync_cluster();
  }
};

template <Float kType>
struct Registers {
  SLIDERQUANT_DEVICE static void run(const Words& words, int rank, int thread, char*) {
    ptx::wait_for_grid();
    ptx::let_next_grid_begin();
    const Vec4 a = ptx::load_vector(reinterpret_cast<const Vec4*>(words.a) + thread);
    const uint32_t* c = words.c + kSums * thread;
    put(words, rank, thread, 0, ptx::transpose(a.v[0]));
    put(words, rank, thread, 1, ptx::pack2<kType>(bits_to_float(ptx::load(c)), bits_to_float(ptx::load(c + 1))));
    put(words, rank, thread, 2, ptx::scale2<kType>(a.v[1], a.v[2], a.v[3]));
  }
};

using product_bf16_64 = Product<Operand::kBf16, float, 32>;
using product_bf16_96 = Product<Operand::kBf16, float, 48>;
using product_bf16_128 = Product<Operand::kBf16, float, 64>;
using product_fp16_64 = Product<Operand::kFp16, float, 32>;
using product_fp16_96 = Product<Operand::kFp16, float, 48>;
using product_fp16_128 = Product<Operand::kFp16, float, 64>;
using product_byte_64 = Product<Operand::kByte, int32_t, 32>;
using product_byte_96 = Product<Operand::kByte, int32_t, 48>;
using product_byte_128 = Product<Operand::kByte, int32_t, 64>;
using registers_bf16 = Registers<Float::kBf16>;
using registers_fp16 = Registers<Float::kFp16>;

#define SLIDERQUANT_PTX_SM90_BODIES(VISIT)                                                \
  VISIT(product_bf16_64) VISIT(product_bf16_96) VISIT(product_bf16_128)                   \
  VISIT(product_fp16_64) VISIT(product_fp16_96) VISIT(product_fp16_128)                   \
  VISIT(product_byte_64) VISIT(product_byte_96) VISIT(product_byte_128)                   \
  VISIT(cluster) VISIT(registers_bf16) VISIT(registers_fp16)

}  // namespace sliderquant::cuda::selftest90
