// Runs the CUDA kernel classes on the host, one block of threads after the other: a phase ends where the device has a
// barrier, so a thread that reads what another has not yet written in an earlier phase finds poison here.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../csrc/cuda/integer_gemm.cuh"
#include "../csrc/cuda/quantize.cuh"
#include "../csrc/cuda/repack.cuh"
#include "../csrc/cuda/wna16.cuh"
#include "cuda_runner.h"

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

std::string error;

}  // namespace

using namespace sliderquant;

extern "C" {

const char* emulate_repack(const uint32_t* stream, uint32_t* packed, int64_t n, int64_t k, int64_t bits, int64_t pairs,
                           int64_t seed) {
  const Repack args = {stream, packed, n, k, static_cast<int>(bits), pairs != 0};
  cuda::BlockRunner runner(static_cast<uint64_t>(seed));
  runner.allow(packed, layout::gpu::packed_words(args.bits, n, k) * 4, true);
  error = runner.run(cuda::RepackKernel::blocks(args), cuda::RepackKernel::kThreads, 0,
                     [&](int64_t block, int thread, char*) { cuda::RepackKernel::run(args, block, thread); });
  return error.c_str();
}

void emulate_wna16(const uint16_t* x, int64_t fp16, int64_t x_stride, const uint32_t* w, const float* scale,
                   const uint8_t* zero, const float* bias, uint16_t* y, int64_t m, int64_t n, int64_t k, int64_t group,
                   int64_t bits) {
  emulate<cuda::Wna16Kernel>(
      {x, fp16 ? Float::kFp16 : Float::kBf16, x_stride, w, scale, zero, bias, y, m, n, k, group,
       static_cast<int>(bits)});
}

void emulate_quantize(const uint16_t* x, int64_t fp16, int64_t x_stride, uint8_t* codes, float* scale, int32_t* zero,
                      int32_t* row_sum, int64_t m, int64_t k, int64_t bits, int64_t symmetric) {
  emulate<cuda::QuantizeKernel>(
      {x, fp16 ? Float::kFp16 : Float::kBf16, x_stride, codes, scale, zero, row_sum, m, k, 1,
       static_cast<int>(bits), symmetric != 0});
}

void emulate_integer_gemm(const uint8_t* codes, const float* sa, const int32_t* za, const int32_t* row_sum,
                          const uint32_t* w, const float* sw, const uint8_t* zw, const int32_t* col_sum,
                          const float* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t bits) {
  emulate<cuda::IntegerGemmKernel>(
      {codes, sa, za, row_sum, w, sw, zw, col_sum, bias, y, Float::kFp32, m, n, k,
       static_cast<int>(bits)});
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
