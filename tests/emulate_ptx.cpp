// The host versions of ptx.cuh, the fragment map, and the runner's own detection of errors, for test_cuda_ptx.py.
#include <map>
#include <string>

#include "cuda_runner.h"
#include "ptx_bodies.cuh"
#include "ptx_sm90_bodies.cuh"

namespace {

using namespace sliderquant;
using namespace sliderquant::cuda;

// Bodies that hold an error each.
using Faulty = void (*)(int thread, char* shared, const uint32_t* given);

void diverges_at_a_barrier(int thread, char*, const uint32_t*) {
  if (thread != 40) ptx::sync_threads();
}

void leaves_a_warp(int thread, char*, const uint32_t*) {
  if (thread % 32 != 7) ptx::shuffle_xor(thread, 1);
}

void disagrees(int thread, char*, const uint32_t*) {
  if (thread == 3) {
    ptx::sync_warp();
  } else {
    ptx::shuffle_xor(thread, 1);
  }
}

void reads_outside(int thread, char*, const uint32_t* given) { ptx::load(given + 1 + thread); }

void writes_what_it_may_read(int, char*, const uint32_t* given) { ptx::store(const_cast<uint32_t*>(given), 1u); }

void copies_unaligned(int thread, char* shared, const uint32_t* given) {
  ptx::cp_async(shared + 16 * thread, given + 1, ptx::evict_first());
}

void overflows_shared(int, char* shared, const uint32_t*) { shared[1024] = 0; }

// Of the products of warps: 16 KB that a bulk copy brings, one product. Each fault is named by its number.
enum ProductFault { kNone, kUnfenced, kOrdinaryWrite, kUnwaited, kOtherB, kUnfencedBarrier, kUnalignedCopy };

template <int kFault>
void multiplies(int thread, char* shared, const uint32_t* given) {
  constexpr int kBytes = 128 * 64;
  auto* barrier = reinterpret_cast<uint64_t*>(shared + kBytes);
  if (thread == 0) {
    ptx::barrier_init(barrier, 1);
    if (kFault != kUnfencedBarrier) ptx::barrier_fence();
  }
  ptx::sync_threads();
  if (thread == 0) {
    ptx::barrier_arrive(barrier, kBytes);
    ptx::bulk_copy(shared + (kFault == kUnalignedCopy ? 8 : 0), given, kBytes, barrier, ptx::evict_normal());
  }
  ptx::barrier_wait(barrier, 0);
  if (kFault == kOrdinaryWrite && thread == 9) shared[16] = 1;
  ptx::sync_threads();
  float d[32] = {};
  const uint32_t a[4] = {};
  const int k = kFault == kOtherB && thread >= 96 ? swizzled::kDepthBytes : 0;
  const uint64_t b = swizzled::advanced(swizzled::descriptor(ptx::shared_address(shared)), k);
  if (kFault != kUnfenced) ptx::product_fence();
  ptx::product<Operand::kBf16>(d, a, b);
  ptx::product_commit();
  if (kFault != kUnwaited) ptx::product_wait<0>();
}

const std::map<std::string, Faulty> kFaultyProducts = {
    {"none", multiplies<kNone>},
    {"unfenced", multiplies<kUnfenced>},
    {"ordinary_write", multiplies<kOrdinaryWrite>},
    {"unwaited", multiplies<kUnwaited>},
    {"other_b", multiplies<kOtherB>},
    {"unfenced_barrier", multiplies<kUnfencedBarrier>},
    {"unaligned_copy", multiplies<kUnalignedCopy>},
};

const std::map<std::string, Faulty> kFaulty = {
    {"diverges_at_a_barrier", diverges_at_a_barrier},
    {"leaves_a_warp", leaves_a_warp},
    {"disagrees", disagrees},
    {"reads_outside", reads_outside},
    {"writes_what_it_may_read", writes_what_it_may_read},
    {"copies_unaligned", copies_unaligned},
    {"overflows_shared", overflows_shared},
};

std::string error;

}  // namespace

extern "C" {

void fragment_place(int64_t operand, int64_t bits, int64_t lane, int64_t i, int64_t* row, int64_t* column) {
  const int b = static_cast<int>(bits), l = static_cast<int>(lane), e = static_cast<int>(i);
  const auto place = operand == 0   ? fragment::a(b, l, e)
                     : operand == 1 ? fragment::b(b, l, e)
                     : operand == 2 ? fragment::c(l, e)
                                    : fragment::matrix(l, e);
  *row = place.row;
  *column = place.column;
}

int64_t swizzled_place(int64_t offset) { return swizzled::place(offset); }

uint64_t descriptor(int64_t address, int64_t bytes) {
  return swizzled::advanced(swizzled::descriptor(static_cast<uint32_t>(address)), static_cast<int>(bytes));
}

const char* run_ptx(const char* name, uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d, int64_t seed) {
  BlockRunner runner(static_cast<uint64_t>(seed));
  runner.allow(a, kWarp * 16);
  runner.allow(b, kWarp * 8);
  runner.allow(c, kWarp * 16);
  runner.allow(d, kWarp * 16, true);
  const selftest::Words words = {a, b, c, d};
  void (*body)(const selftest::Words&, int, char*) = nullptr;
#define SLIDERQUANT_FIND(NAME) \
  if (name == std::string(#NAME)) body = selftest::NAME::run;
  SLIDERQUANT_PTX_BODIES(SLIDERQUANT_FIND)
  if (body == nullptr) return "no such body";
  error = runner.run(1, kWarp, selftest::kSharedBytes,
                     [&](int64_t, int thread, char* shared) { body(words, thread, shared); });
  return error.c_str();
}

const char* run_ptx_sm90(const char* name, uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d, int64_t seed) {
  using namespace selftest90;
  BlockRunner runner(static_cast<uint64_t>(seed));
  runner.allow(a, kThreads * 16);
  runner.allow(b, kTokens * 32);
  runner.allow(c, kThreads * kSums * 4);
  runner.allow(d, kBlocks * kThreads * kSums * 4, true);
  const Words words = {a, b, c, d};
  void (*body)(const Words&, int, int, char*) = nullptr;
#define SLIDERQUANT_FIND_SM90(NAME) \
  if (name == std::string(#NAME)) body = selftest90::NAME::run;
  SLIDERQUANT_PTX_SM90_BODIES(SLIDERQUANT_FIND_SM90)
  if (body == nullptr) return "no such body";
  error = runner.run(
      kBlocks, kThreads, kSharedBytes,
      [&](int64_t block, int thread, char* shared) { body(words, static_cast<int>(block), thread, shared); }, kBlocks);
  return error.c_str();
}

const char* run_faulty_product(const char* name, int64_t seed) {
  alignas(16) static uint32_t given[128 * 64 / 4] = {};
  BlockRunner runner(static_cast<uint64_t>(seed));
  runner.allow(given, sizeof given);
  const Faulty body = kFaultyProducts.at(name);
  error = runner.run(1, 128, 128 * 64 + 8, [&](int64_t, int thread, char* shared) { body(thread, shared, given); });
  return error.c_str();
}

// How often a product is right though its operand or its sums are touched before the wait: 0 an operand that changes,
// 1 sums that are read.
double share_of_products_right(int64_t early, int64_t seed) {
  alignas(16) static uint32_t given[128 * 64 / 4];
  for (uint32_t& pair : given) pair = 0x3F803F80;  // ones
  BlockRunner runner(static_cast<uint64_t>(seed));
  runner.allow(given, sizeof given);
  int right = 0;
  error = runner.run(1, 128, 128 * 64 + 8, [&](int64_t, int thread, char* shared) {
    auto* barrier = reinterpret_cast<uint64_t*>(shared + 128 * 64);
    if (thread == 0) {
      ptx::barrier_init(barrier, 1);
      ptx::barrier_fence();
    }
    ptx::sync_threads();
    if (thread == 0) {
      ptx::barrier_arrive(barrier, 128 * 64);
      ptx::bulk_copy(shared, given, 128 * 64, barrier, ptx::evict_normal());
    }
    ptx::barrier_wait(barrier, 0);
    float d[32] = {};
    uint32_t a[4] = {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
    ptx::product_fence();
    ptx::product<Operand::kBf16>(d, a, swizzled::descriptor(ptx::shared_address(shared)));
    if (early == 0) a[0] = a[1] = a[2] = a[3] = 0;
    const float seen = d[0];
    ptx::product_commit();
    ptx::product_wait<0>();
    right += (early == 0 ? d[0] : seen) == 16;
  });
  return error.empty() ? right / 128.0 : -1;
}

const char* run_faulty(const char* name, int64_t seed) {
  alignas(16) uint32_t given[8] = {};
  BlockRunner runner(static_cast<uint64_t>(seed));
  runner.allow(given, sizeof given);
  const Faulty body = kFaulty.at(name);
  error = runner.run(1, 64, 1024, [&](int64_t, int thread, char* shared) { body(thread, shared, given); });
  return error.c_str();
}

// What a thread finds in shared memory that another thread's copy fills, with and without the wait before a barrier.
double share_of_copies_seen(int64_t waits, int64_t seed) {
  alignas(16) uint32_t given[32][4] = {};
  BlockRunner runner(static_cast<uint64_t>(seed));
  runner.allow(given, sizeof given);
  int seen = 0;
  error = runner.run(1, 32, 512, [&](int64_t, int thread, char* shared) {
    ptx::cp_async(shared + 16 * thread, given[thread], ptx::evict_first());
    ptx::cp_async_commit();
    if (waits) ptx::cp_async_wait<0>();
    ptx::sync_threads();
    seen += shared[16 * (31 - thread)] == 0;
  });
  return error.empty() ? seen / 32.0 : -1;
}

// The order in which the threads of a block come to a place.
void order_of_threads(int64_t seed, int64_t* order) {
  BlockRunner runner(static_cast<uint64_t>(seed));
  error = runner.run(1, 64, 0, [&](int64_t, int thread, char*) { *order++ = thread; });
}

}  // extern "C"
