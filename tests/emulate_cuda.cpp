// Runs the CUDA kernel classes on the host, one block of threads after the other: a phase ends where the device has a
// barrier, so a thread that reads what another has not yet written in an earlier phase finds poison here.
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../csrc/cuda/integer_gemm.cuh"
#include "../csrc/cuda/sm80_integer.cuh"
#include "../csrc/cuda/sm80_wna16.cuh"
#include "../csrc/cuda/wna16.cuh"
#include "cuda_runner.h"
#include "emulate_operands.h"
#include "emulate_repack.h"

namespace {

template <class Kernel>
void emulate(const typename Kernel::Args& args) {
  const auto shared = std::make_unique<typename Kernel::Shared>();
  for (int64_t tile = 0; tile < Kernel::tiles(args); ++tile) {
    std::memset(static_cast<void*>(shared.get()), 0xFF, sizeof *shared);  // NaN as a float, out of range as a code
    std::vector<Kernel> threads;
    for (int thread = 0; thread < Kernel::kThreads; ++thread) threads.emplace_back(args, tile, thread);
    for (int64_t step = 0; step < Kernel::steps(args); ++step) {
      for (Kernel& thread : threads) thread.stage(*shared, step);
      for (Kernel& thread : threads) thread.compute(*shared, step);
    }
    for (Kernel& thread : threads) thread.finish();
  }
}

using namespace sliderquant;

std::string error;

template <int kBits, Float kType, int kTiles>
std::string emulate_sm80(const Wna16& a, int splits, uint64_t seed) {
  using Kernel = cuda::Sm80Wna16<kBits, kType, kTiles>;
  std::vector<float> partial(splits > 1 ? static_cast<size_t>(splits * a.m * a.n) : 0, NAN);
  const cuda::Wna16Blocks blocks = {splits, partial.data()};
  cuda::BlockRunner runner(seed);
  allow_tokens(runner, a);
  allow_operands(runner, a);
  runner.allow(partial.data(), static_cast<int64_t>(partial.size()) * 4, true);
  std::string found = runner.run(
      Kernel::blocks(a, splits), Kernel::kThreads, Kernel::kSharedBytes,
      [&](int64_t block, int thread, char* shared) { Kernel::run(a, blocks, block, thread, shared); });
  if (found.empty() && splits > 1) {
    found = runner.run(cuda::Wna16Reduce::blocks(a), cuda::Wna16Reduce::kThreads, 0,
                       [&](int64_t block, int thread, char*) { cuda::Wna16Reduce::run(a, blocks, block, thread); });
  }
  return found;
}

template <int kBits, Float kType>
std::string emulate_sm80(const Wna16& a, int64_t tiles, int splits, uint64_t seed) {
  switch (tiles) {
    case 1: return emulate_sm80<kBits, kType, 1>(a, splits, seed);
    case 2: return emulate_sm80<kBits, kType, 2>(a, splits, seed);
    case 4: return emulate_sm80<kBits, kType, 4>(a, splits, seed);
    default: return emulate_sm80<kBits, kType, 8>(a, splits, seed);
  }
}

template <Float kType>
std::string emulate_sm80(const Wna16& a, int64_t tiles, int splits, uint64_t seed) {
  switch (a.bits) {
    case 2: return emulate_sm80<2, kType>(a, tiles, splits, seed);
    case 3: return emulate_sm80<3, kType>(a, tiles, splits, seed);
    case 4: return emulate_sm80<4, kType>(a, tiles, splits, seed);
    default: return emulate_sm80<8, kType>(a, tiles, splits, seed);
  }
}

template <int kBits, int kTokens>
std::string emulate_sm80_integer(const IntegerGemm& a, int splits, uint64_t seed) {
  using Kernel = cuda::Sm80Integer<kBits, kTokens>;
  std::vector<uint32_t> partial(splits > 1 ? static_cast<size_t>(splits * a.m * a.n) : 0, 0x12345678);
  const cuda::IntegerBlocks blocks = {splits, partial.data()};
  cuda::BlockRunner runner(seed);
  allow_tokens(runner, a);
  allow_operands(runner, a);
  runner.allow(partial.data(), static_cast<int64_t>(partial.size()) * 4, true);
  std::string found = runner.run(
      Kernel::blocks(a, splits), Kernel::kThreads, Kernel::kSharedBytes,
      [&](int64_t block, int thread, char* shared) { Kernel::run(a, blocks, block, thread, shared); });
  if (found.empty() && splits > 1) {
    found = runner.run(cuda::IntegerReduce::blocks(a), cuda::IntegerReduce::kThreads, 0,
                       [&](int64_t block, int thread, char*) { cuda::IntegerReduce::run(a, blocks, block, thread); });
  }
  return found;
}

template <int kBits>
std::string emulate_sm80_integer(const IntegerGemm& a, int64_t tokens, int splits, uint64_t seed) {
  switch (tokens) {
    case 8: return emulate_sm80_integer<kBits, 8>(a, splits, seed);
    case 16: return emulate_sm80_integer<kBits, 16>(a, splits, seed);
    case 32: return emulate_sm80_integer<kBits, 32>(a, splits, seed);
    case 64: return emulate_sm80_integer<kBits, 64>(a, splits, seed);
    default: return emulate_sm80_integer<kBits, 128>(a, splits, seed);
  }
}

}  // namespace

extern "C" {

void emulate_wna16(const uint16_t* x, int64_t fp16, int64_t x_stride, const uint32_t* w, const float* scale,
                   const uint8_t* zero, const float* bias, uint16_t* y, int64_t m, int64_t n, int64_t k, int64_t group,
                   int64_t bits) {
  emulate<cuda::Wna16Kernel>(
      {x, fp16 ? Float::kFp16 : Float::kBf16, x_stride, w, scale, zero, bias, y, m, n, k, group,
       static_cast<int>(bits)});
}

const char* emulate_sm80_wna16(const uint16_t* x, int64_t fp16, int64_t x_stride, const uint32_t* w,
                               const float* scale, const uint8_t* zero, const float* bias, uint16_t* y, int64_t m,
                               int64_t n, int64_t k, int64_t group, int64_t bits, int64_t tiles, int64_t splits,
                               int64_t seed) {
  const Wna16 a = {x,    fp16 ? Float::kFp16 : Float::kBf16, x_stride, w, scale, zero, bias, y, m, n, k, group,
                   static_cast<int>(bits)};
  const auto of_type = fp16 ? emulate_sm80<Float::kFp16> : emulate_sm80<Float::kBf16>;
  error = of_type(a, tiles, static_cast<int>(splits), static_cast<uint64_t>(seed));
  return error.c_str();
}

void emulate_integer_gemm(const uint8_t* codes, const float* sa, const int32_t* za, const int32_t* row_sum,
                          const uint32_t* w, const float* sw, const uint8_t* zw, const int32_t* col_sum,
                          const float* bias, void* y, int64_t y_type, int64_t m, int64_t n, int64_t k, int64_t bits) {
  emulate<cuda::IntegerGemmKernel>(
      {codes, sa, za, row_sum, w, sw, zw, col_sum, bias, y, static_cast<Float>(y_type), m, n, k,
       static_cast<int>(bits)});
}

const char* emulate_sm80_integer(const uint8_t* codes, const float* sa, const int32_t* za, const int32_t* row_sum,
                                 const uint32_t* w, const float* sw, const uint8_t* zw, const int32_t* col_sum,
                                 const float* bias, void* y, int64_t y_type, int64_t m, int64_t n, int64_t k,
                                 int64_t bits, int64_t tokens, int64_t splits, int64_t seed) {
  const IntegerGemm a = {codes, sa,   za, row_sum, w, sw, zw, col_sum, bias, y, static_cast<Float>(y_type), m, n, k,
                         static_cast<int>(bits)};
  const auto of_bits = bits == 2   ? emulate_sm80_integer<2>
                       : bits == 3 ? emulate_sm80_integer<3>
                       : bits == 4 ? emulate_sm80_integer<4>
                                   : emulate_sm80_integer<8>;
  error = of_bits(a, tokens, static_cast<int>(splits), static_cast<uint64_t>(seed));
  return error.c_str();
}

void convert(const float* from, uint16_t* bf16, uint16_t* fp16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    bf16[i] = float_to_bf16(from[i]);
    fp16[i] = float_to_fp16(from[i]);
  }
}

void widen(const uint16_t* from, float* bf16, float* fp16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    bf16[i] = bf16_to_float(from[i]);
    fp16[i] = fp16_to_float(from[i]);
  }
}

}  // extern "C"
