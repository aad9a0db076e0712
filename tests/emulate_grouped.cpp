// Runs the kernels of grouped.cuh on the host, for test_cuda_grouped.py: all experts at once, or one of the kernels they
// are built on with one weight.
#include <cmath>
#include <string>
#include <vector>

#include "../csrc/cuda/grouped.cuh"
#include "cuda_runner.h"
#include "emulate_repack.h"
#include "emulate_operands.h"

namespace {

using namespace sliderquant;

std::string error;

template <class Kernel, class Reduce, class Sum, class Args, class Gemm>
const char* run(const Args& args, const Gemm& gemm, const Experts& experts, int splits, uint64_t seed) {
  std::vector<Sum> partial(splits > 1 ? static_cast<size_t>(splits * gemm.m * gemm.n) : 0, static_cast<Sum>(NAN));
  const cuda::Splits<Sum> blocks = {splits, partial.data()};
  cuda::BlockRunner runner(seed);
  allow_tokens(runner, gemm);
  allow_operands(runner, gemm, experts.offsets != nullptr ? experts.count : 1);
  runner.allow(experts.offsets, (experts.count + 1) * 4);
  runner.allow(partial.data(), static_cast<int64_t>(partial.size()) * 4, true);
  error = runner.run(
      Kernel::blocks(args, splits), Kernel::kThreads, Kernel::kSharedBytes,
      [&](int64_t block, int thread, char* shared) { Kernel::run(args, blocks, block, thread, shared); });
  if (error.empty() && splits > 1) {
    error = runner.run(Reduce::blocks(args), Reduce::kThreads, 0,
                       [&](int64_t block, int thread, char*) { Reduce::run(args, blocks, block, thread); });
  }
  return error.c_str();
}

// With one weight where there are no offsets.
template <class Kernel, class Reduce, class Sum, class Gemm>
const char* run(const Gemm& a, const Experts& experts, int splits, uint64_t seed) {
  using Blocks = cuda::Splits<Sum>;
  if (experts.offsets == nullptr) return run<Kernel, Reduce, Sum>(a, a, experts, splits, seed);
  const cuda::GroupedGemm<Gemm> args = {a, experts};
  return run<cuda::GroupedKernel<Kernel, Gemm, Blocks>, cuda::GroupedReduce<Reduce, Gemm, Blocks>, Sum>(
      args, a, experts, splits, seed);
}

template <int kBits, Float kType>
const char* run_wna16(const Wna16& a, const Experts& experts, int64_t tokens, int splits, uint64_t seed) {
  using Reduce = cuda::Wna16Reduce;
  switch (tokens) {
    case 8: return run<cuda::Sm80Wna16<kBits, kType, 1>, Reduce, float>(a, experts, splits, seed);
    case 32: return run<cuda::Sm80Wna16<kBits, kType, 4>, Reduce, float>(a, experts, splits, seed);
    default: return run<cuda::Sm80Wna16<kBits, kType, 8>, Reduce, float>(a, experts, splits, seed);
  }
}

template <int kBits>
const char* run_integer(const IntegerGemm& a, const Experts& experts, int64_t tokens, int splits, uint64_t seed) {
  using Reduce = cuda::IntegerReduce;
  switch (tokens) {
    case 8: return run<cuda::Sm80Integer<kBits, 8>, Reduce, uint32_t>(a, experts, splits, seed);
    case 32: return run<cuda::Sm80Integer<kBits, 32>, Reduce, uint32_t>(a, experts, splits, seed);
    default: return run<cuda::Sm80Integer<kBits, 128>, Reduce, uint32_t>(a, experts, splits, seed);
  }
}

}  // namespace

extern "C" {

// Widths of 4 and 3 bits stand for all: how codes are unpacked is the kernels' own.
const char* emulate_wna16(const uint16_t* x, int64_t fp16, int64_t x_stride, const uint32_t* w, const float* scale,
                          const uint8_t* zero, const float* bias, uint16_t* y, int64_t m, int64_t n, int64_t k,
                          int64_t group, int64_t bits, const int32_t* offsets, int64_t experts, int64_t tokens,
                          int64_t splits, int64_t seed) {
  const Wna16 a = {x,    fp16 ? Float::kFp16 : Float::kBf16, x_stride, w, scale, zero, bias, y, m, n, k, group,
                   static_cast<int>(bits)};
  const auto of_type = bits == 3 ? (fp16 ? run_wna16<3, Float::kFp16> : run_wna16<3, Float::kBf16>)
                                 : (fp16 ? run_wna16<4, Float::kFp16> : run_wna16<4, Float::kBf16>);
  return of_type(a, {offsets, experts}, tokens, static_cast<int>(splits), static_cast<uint64_t>(seed));
}

const char* emulate_integer(const uint8_t* codes, const float* sa, const int32_t* za, const int32_t* row_sum,
                            const uint32_t* w, const float* sw, const uint8_t* zw, const int32_t* col_sum,
                            const float* bias, void* y, int64_t y_type, int64_t m, int64_t n, int64_t k, int64_t bits,
                            const int32_t* offsets, int64_t experts, int64_t tokens, int64_t splits, int64_t seed) {
  const IntegerGemm a = {codes, sa,   za, row_sum, w, sw, zw, col_sum, bias, y, static_cast<Float>(y_type), m, n, k,
                         static_cast<int>(bits)};
  const auto of_bits = bits == 3 ? run_integer<3> : run_integer<4>;
  return of_bits(a, {offsets, experts}, tokens, static_cast<int>(splits), static_cast<uint64_t>(seed));
}

// What of each slot of so many tokens belongs to which expert: [slots][4], as GroupedShare has it.
const char* shares(const int32_t* offsets, int64_t experts, int64_t m, int64_t tokens, int32_t* found) {
  cuda::BlockRunner runner(0);
  runner.allow(offsets, (experts + 1) * 4);
  const Experts all = {offsets, experts};
  const auto of_tokens = tokens == 8 ? cuda::grouped_share<8> : cuda::grouped_share<128>;
  error = runner.run(cuda::grouped_slots(m, experts, static_cast<int>(tokens)), 32, 0,
                     [&](int64_t block, int thread, char*) {
                       const auto share = of_tokens(all, static_cast<int>(m), static_cast<int>(block), thread);
                       const int32_t fields[] = {share.expert, share.begin, share.count, share.tile};
                       if (thread == 17) std::copy(fields, fields + 4, found + 4 * block);
                     });
  return error.c_str();
}

int64_t slots(int64_t m, int64_t experts, int64_t tokens) {
  return cuda::grouped_slots(m, experts, static_cast<int>(tokens));
}

void plan(int64_t m, int64_t n, int64_t k, int64_t bits, int64_t experts, int64_t integer, int64_t* tokens,
          int64_t* splits) {
  const auto of_kind = integer ? cuda::plan_integer_grouped : cuda::plan_wna16_grouped;
  const cuda::Plan found = of_kind(m, n, k, static_cast<int>(bits), experts, {90, 132}, nullptr);
  *tokens = found.tokens;
  *splits = found.splits;
}

}  // extern "C"
