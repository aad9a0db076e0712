// Runs the phases of a kernel class on the device and launches it.
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "integer_gemm.cuh"
#include "launch.h"
#include "launch_on.cuh"
#include "launch_sm80.cuh"
#include "launch_sm90.h"
#include "repack.cuh"
#include "sm80_integer.cuh"
#include "sm80_wna16.cuh"
#include "wna16.cuh"

namespace sliderquant::cuda {
namespace {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) run(const __grid_constant__ typename Kernel::Args args) {
  __shared__ typename Kernel::Shared shared;
  const int64_t tiles = Kernel::tiles(args), steps = Kernel::steps(args);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Kernel kernel(args, tile, static_cast<int>(threadIdx.x));
    for (int64_t step = 0; step < steps; ++step) {
      kernel.stage(shared, step);
      __syncthreads();
      kernel.compute(shared, step);
      __syncthreads();
    }
    kernel.finish();
  }
}

template <class Kernel>
const char* launch(const typename Kernel::Args& args, int device, uintptr_t stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t tiles = Kernel::tiles(args);
  const auto blocks = static_cast<unsigned>(tiles < kMaxBlocks ? tiles : kMaxBlocks);
  return launch_on(
      device, [&] { run<Kernel><<<blocks, Kernel::kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args); });
}

__global__ void __launch_bounds__(RepackKernel::kThreads) run_repack(const __grid_constant__ Repack args) {
  RepackKernel::run(args, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <int kBits, Float kType>
const char* launch_wna16(const Wna16& args, int tokens, const Wna16Blocks& blocks, int device, uintptr_t stream) {
  switch (tokens) {
    case 8: return launch_sm80<Sm80Wna16<kBits, kType, 1>, Wna16Reduce>(args, blocks, device, stream);
    case 16: return launch_sm80<Sm80Wna16<kBits, kType, 2>, Wna16Reduce>(args, blocks, device, stream);
    case 32: return launch_sm80<Sm80Wna16<kBits, kType, 4>, Wna16Reduce>(args, blocks, device, stream);
    default: return launch_sm80<Sm80Wna16<kBits, kType, 8>, Wna16Reduce>(args, blocks, device, stream);
  }
}

template <int kBits>
const char* launch_integer(const IntegerGemm& args, int tokens, const IntegerBlocks& blocks, int device,
                           uintptr_t stream) {
  switch (tokens) {
    case 8: return launch_sm80<Sm80Integer<kBits, 8>, IntegerReduce>(args, blocks, device, stream);
    case 16: return launch_sm80<Sm80Integer<kBits, 16>, IntegerReduce>(args, blocks, device, stream);
    case 32: return launch_sm80<Sm80Integer<kBits, 32>, IntegerReduce>(args, blocks, device, stream);
    case 64: return launch_sm80<Sm80Integer<kBits, 64>, IntegerReduce>(args, blocks, device, stream);
    default: return launch_sm80<Sm80Integer<kBits, 128>, IntegerReduce>(args, blocks, device, stream);
  }
}

void check(cudaError_t error, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that no launch reports it again
  throw std::runtime_error("CUDA device " + std::to_string(device) + ": " + cudaGetErrorString(error));
}

Gpu ask(int device) {
  int major = 0, minor = 0;
  Gpu gpu = {};
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), device);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), device);
  check(cudaDeviceGetAttribute(&gpu.processors, cudaDevAttrMultiProcessorCount, device), device);
  gpu.arch = 10 * major + minor;
#ifndef SLIDERQUANT_SM90A
  if (gpu.arch == 90) gpu.arch = 89;  // a build without the kernels for sm_90a, which takes those for sm_80
#endif
  return gpu;
}

}  // namespace

const Gpu& gpu(int device) {
  static std::mutex mutex;
  static std::map<int, Gpu> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) found = known.emplace(device, ask(device)).first;
  return found->second;
}

const char* wna16(const Wna16& args, const Plan& plan, float* workspace, int device, uintptr_t stream) {
  if (!plan.tensor_cores) return launch<Wna16Kernel>(args, device, stream);
  const Wna16Blocks blocks = {plan.splits, workspace + plan.arranged};
  if (plan.wgmma) {
    const char* error = wna16_sm90(args, plan, workspace, gpu(device).processors, device, stream);
    return error != nullptr ? error : launch_reduce<Wna16Reduce>(args, blocks, device, stream);
  }
  const auto launch = layout::with_bits(args.bits, [&](auto bits) {
    return args.x_type == Float::kFp16 ? launch_wna16<bits, Float::kFp16> : launch_wna16<bits, Float::kBf16>;
  });
  return launch(args, plan.tokens, blocks, device, stream);
}

Plan plan(const Wna16& args, int device) {
  Plan found = plan_wna16(args.m, args.n, args.k, args.bits, gpu(device), std::getenv("SLIDERQUANT_CUDA_WNA16"));
  if (found.wgmma) found.arranged = sm90_workspace(args).arranged();
  return found;
}

const char* integer_gemm(const IntegerGemm& args, const Plan& plan, uint32_t* workspace, int device,
                         uintptr_t stream) {
  if (!plan.tensor_cores) return launch<IntegerGemmKernel>(args, device, stream);
  const IntegerBlocks blocks = {plan.splits, workspace + plan.arranged};
  if (plan.wgmma) {
    const char* error = integer_gemm_sm90(args, plan, workspace, gpu(device).processors, device, stream);
    return error != nullptr ? error : launch_reduce<IntegerReduce>(args, blocks, device, stream);
  }
  return layout::with_bits(
      args.bits, [&](auto bits) { return launch_integer<bits>(args, plan.tokens, blocks, device, stream); });
}

Plan plan(const IntegerGemm& args, int device) {
  Plan found = plan_integer(args.m, args.n, args.k, args.bits, gpu(device), std::getenv("SLIDERQUANT_CUDA_INTEGER"));
  if (found.wgmma) found.arranged = sm90_workspace(args).arranged();
  return found;
}

const char* repack(const Repack& args, int device, uintptr_t stream) {
  const auto blocks = static_cast<unsigned>(RepackKernel::blocks(args));
  return launch_on(device, [&] {
    run_repack<<<blocks, RepackKernel::kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
  });
}

}  // namespace sliderquant::cuda
