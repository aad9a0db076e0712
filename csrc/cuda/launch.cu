// Runs the phases of a kernel class on the device and launches it.
#include <cuda_runtime.h>

#include "integer_gemm.cuh"
#include "launch.h"
#include "quantize.cuh"
#include "repack.cuh"
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

// Makes a device current for one launch and gives the previous one back: this runtime is linked statically and knows
// nothing of the host framework's choice.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

template <class Launch>
const char* launch_on(int device, const Launch& enqueue) {
  const DeviceGuard guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    enqueue();
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
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

}  // namespace

const char* wna16(const Wna16& args, int device, uintptr_t stream) {
  return launch<Wna16Kernel>(args, device, stream);
}

const char* quantize(const Quantize& args, int device, uintptr_t stream) {
  return launch<QuantizeKernel>(args, device, stream);
}

const char* integer_gemm(const IntegerGemm& args, int device, uintptr_t stream) {
  return launch<IntegerGemmKernel>(args, device, stream);
}

const char* repack(const Repack& args, int device, uintptr_t stream) {
  const auto blocks = static_cast<unsigned>(RepackKernel::blocks(args));
  return launch_on(device, [&] {
    run_repack<<<blocks, RepackKernel::kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
  });
}

}  // namespace sliderquant::cuda
