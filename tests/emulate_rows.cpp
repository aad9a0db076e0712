// Runs the kernels of rows.cuh on the host, for test_cuda_rows.py.
#include <algorithm>
#include <cstring>
#include <string>

#include "../csrc/cuda/rows.cuh"
#include "cuda_runner.h"

namespace {

using namespace sliderquant;
using cuda::RowsPlan;

std::string error;

void allow_sizes(cuda::BlockRunner& runner, const Quantize& a, int64_t columns) {
  runner.allow(a.x, ((a.m - 1) * a.x_stride + columns) * 2);
  runner.allow(a.codes, a.m * a.k, true);
  for (void* of_token : {static_cast<void*>(a.scale), static_cast<void*>(a.zero), static_cast<void*>(a.row_sum)}) {
    runner.allow(of_token, a.m * 4, true);
  }
}

template <class Row, int kRuns>
std::string emulate(cuda::BlockRunner& runner, const typename Row::Args& a, const RowsPlan& plan) {
  using Kernel = cuda::RowKernel<Row, kRuns>;
  if (plan.threads > Kernel::kMostThreads || plan.threads % cuda::kWarp != 0) return "no such number of threads";
  return runner.run(
      Row::sizes(a).m, plan.threads, Kernel::shared_bytes(a, plan),
      [&](int64_t m, int thread, char* shared) { Kernel::run(a, plan.threads, m, thread, shared); });
}

// threads and runs: 0 for what plan_rows chooses for a GPU of 132 processors.
template <class Row>
const char* emulate(cuda::BlockRunner& runner, const typename Row::Args& a, int64_t threads, int64_t runs) {
  const auto& sizes = Row::sizes(a);
  RowsPlan plan = cuda::plan_rows(sizes.m, sizes.k, sizes.block, 132);
  if (runs != 0) plan.runs = static_cast<int>(runs);
  if (threads != 0) plan.threads = static_cast<int>(threads);
  error = plan.runs == 1   ? emulate<Row, 1>(runner, a, plan)
          : plan.runs == 2 ? emulate<Row, 2>(runner, a, plan)
                           : emulate<Row, 4>(runner, a, plan);
  return error.c_str();
}

Quantize quantize_args(const uint16_t* x, int64_t fp16, int64_t x_stride, uint8_t* codes, float* scale, int32_t* zero,
                       int32_t* row_sum, int64_t m, int64_t k, int64_t bits, int64_t symmetric, int64_t block) {
  return {x, fp16 ? Float::kFp16 : Float::kBf16, x_stride, codes, scale, zero, row_sum, m, k, block,
          static_cast<int>(bits), symmetric != 0};
}

}  // namespace

extern "C" {

const char* emulate_quantize(const uint16_t* x, int64_t fp16, int64_t x_stride, uint8_t* codes, float* scale,
                             int32_t* zero, int32_t* row_sum, int64_t m, int64_t k, int64_t bits, int64_t symmetric,
                             int64_t block, int64_t threads, int64_t runs, int64_t seed) {
  const Quantize a = quantize_args(x, fp16, x_stride, codes, scale, zero, row_sum, m, k, bits, symmetric, block);
  cuda::BlockRunner runner(static_cast<uint64_t>(seed));
  allow_sizes(runner, a, k);
  return fp16 ? emulate<cuda::QuantizeRow<Float::kFp16>>(runner, a, threads, runs)
              : emulate<cuda::QuantizeRow<Float::kBf16>>(runner, a, threads, runs);
}

const char* emulate_silu_mul(const uint16_t* x, int64_t fp16, int64_t x_stride, uint8_t* codes, float* scale,
                             int32_t* zero, int32_t* row_sum, int64_t m, int64_t k, int64_t bits, int64_t symmetric,
                             int64_t block, int64_t threads, int64_t runs, int64_t seed) {
  const SiluMulQuantize a = {
      quantize_args(x, fp16, x_stride, codes, scale, zero, row_sum, m, k, bits, symmetric, block)};
  cuda::BlockRunner runner(static_cast<uint64_t>(seed));
  allow_sizes(runner, a.quantize, 2 * k);
  return fp16 ? emulate<cuda::SiluMulRow<Float::kFp16>>(runner, a, threads, runs)
              : emulate<cuda::SiluMulRow<Float::kBf16>>(runner, a, threads, runs);
}

const char* emulate_rms_norm(const uint16_t* x, int64_t fp16, int64_t x_stride, uint8_t* codes, float* scale,
                             int32_t* zero, int32_t* row_sum, int64_t m, int64_t k, int64_t bits, int64_t symmetric,
                             int64_t block, int64_t threads, int64_t runs, int64_t seed, const uint16_t* residual,
                             int64_t residual_stride, uint16_t* sum, const uint16_t* weight, const float* epsilon) {
  const RmsNormQuantize a = {
      quantize_args(x, fp16, x_stride, codes, scale, zero, row_sum, m, k, bits, symmetric, block), residual,
      residual_stride, sum, weight, *epsilon};
  cuda::BlockRunner runner(static_cast<uint64_t>(seed));
  allow_sizes(runner, a.quantize, k);
  runner.allow(residual, ((m - 1) * residual_stride + k) * 2);
  if (residual != nullptr) runner.allow(sum, m * k * 2, true);
  runner.allow(weight, k * 2);
  return fp16 ? emulate<cuda::RmsNormRow<Float::kFp16>>(runner, a, threads, runs)
              : emulate<cuda::RmsNormRow<Float::kBf16>>(runner, a, threads, runs);
}

const char* emulate_hadamard(const void* x, void* y, int64_t type, int64_t m, int64_t k, int64_t block,
                             int64_t threads, int64_t runs, int64_t seed) {
  const Hadamard a = {x, y, static_cast<Float>(type), m, k, block};
  cuda::BlockRunner runner(static_cast<uint64_t>(seed));
  const int64_t bytes = m * k * (a.type == Float::kFp32 ? 4 : 2);
  runner.allow(x, bytes);
  runner.allow(y, bytes, true);
  return a.type == Float::kFp32   ? emulate<cuda::HadamardRow<Float::kFp32>>(runner, a, threads, runs)
         : a.type == Float::kFp16 ? emulate<cuda::HadamardRow<Float::kFp16>>(runner, a, threads, runs)
                                  : emulate<cuda::HadamardRow<Float::kBf16>>(runner, a, threads, runs);
}

void plan(int64_t m, int64_t k, int64_t block, int64_t processors, int64_t* threads, int64_t* runs, int64_t* bytes) {
  const RowsPlan plan = cuda::plan_rows(m, k, block, static_cast<int>(processors));
  *threads = plan.threads;
  *runs = plan.runs;
  *bytes = plan.exchange_bytes(block);
}

// token_code without divisions against the formula: how many of count values differ.
int64_t coder_errors(const float* x, const float* scale, int64_t count, int64_t scales, int64_t bits) {
  int64_t errors = 0;
  for (int64_t s = 0; s < scales; ++s) {
    const float most = static_cast<float>((1 << bits) - 1);
    for (const float zero : {0.0f, static_cast<float>(1 << (bits - 1)), most}) {
      const TokenGrid grid = {scale[s], zero, most};
      const cuda::TokenCoder coder(grid);
      for (int64_t i = 0; i < count; ++i) {
        const float value = x[i] * scale[s];
        for (const float near : {value, std::nextafterf(value, 0), std::nextafterf(value, 2 * value)}) {
          errors += coder(near) != token_code(near, grid);
        }
      }
    }
  }
  return errors;
}

}  // extern "C"
