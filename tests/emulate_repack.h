// Checkpoint packing to the kernel layout of a GPU by its own kernel, for the emulators.
#pragma once

#include <string>

#include "../csrc/cuda/repack.cuh"
#include "cuda_runner.h"

extern "C" {

const char* emulate_repack(const uint32_t* stream, uint32_t* packed, int64_t n, int64_t k, int64_t bits, int64_t pairs,
                           int64_t seed) {
  static std::string error;
  const sliderquant::Repack args = {stream, packed, n, k, static_cast<int>(bits), pairs != 0};
  sliderquant::cuda::BlockRunner runner(static_cast<uint64_t>(seed));
  runner.allow(packed, sliderquant::layout::gpu::packed_words(args.bits, n, k) * 4, true);
  using Kernel = sliderquant::cuda::RepackKernel;
  error = runner.run(Kernel::blocks(args), Kernel::kThreads, 0,
                     [&](int64_t block, int thread, char*) { Kernel::run(args, block, thread); });
  return error.c_str();
}

}  // extern "C"
