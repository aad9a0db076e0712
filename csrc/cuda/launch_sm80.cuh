// Launches a kernel for tensor cores, and the one that adds up what its blocks made of shares of K.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "launch_on.cuh"

namespace sliderquant::cuda {

template <class Kernel, class Args, class Blocks>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    run_sm80(const __grid_constant__ Args args, const __grid_constant__ Blocks blocks) {
  extern __shared__ __align__(128) char shared[];
  Kernel::run(args, blocks, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

template <class Reduce, class Args, class Blocks>
__global__ void __launch_bounds__(Reduce::kThreads)
    run_reduce(const __grid_constant__ Args args, const __grid_constant__ Blocks blocks) {
  Reduce::run(args, blocks, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <class Kernel, class Reduce, class Args, class Blocks>
const char* launch_sm80(const Args& args, const Blocks& blocks, int device, uintptr_t stream) {
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto kernel = run_sm80<Kernel, Args, Blocks>;
  static std::atomic<uint64_t> asked{0};
  cudaError_t error = cudaSuccess;
  const char* launched = launch_on(device, [&] {
    error = ask_for_shared(kernel, Kernel::kSharedBytes, device, asked);
    if (error != cudaSuccess) return;
    const auto grid = static_cast<unsigned>(Kernel::blocks(args, blocks.splits));
    kernel<<<grid, Kernel::kThreads, Kernel::kSharedBytes, on>>>(args, blocks);
    if (blocks.splits > 1) {
      const auto reducing = static_cast<unsigned>(Reduce::blocks(args));
      run_reduce<Reduce><<<reducing, Reduce::kThreads, 0, on>>>(args, blocks);
    }
  });
  return error == cudaSuccess ? launched : cudaGetErrorString(error);
}

// The sums that blocks of an sm90_* kernel left, behind it.
template <class Reduce, class Args, class Blocks>
const char* launch_reduce(const Args& args, const Blocks& blocks, int device, uintptr_t stream) {
  if (blocks.splits == 1) return nullptr;
  return launch_on(device, [&] {
    const auto reducing = static_cast<unsigned>(Reduce::blocks(args));
    run_reduce<Reduce><<<reducing, Reduce::kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args, blocks);
  });
}

}  // namespace sliderquant::cuda
