// Runs the phases of a kernel class on the device and launches it.
#include <cuda_runtime.h>

#include "integer_gemm.cuh"
#include "launch.h"
#include "quantize.cuh"
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

template <class Kernel>
const char* launch(const typename Kernel::Args& args, int device, uintptr_t stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t tiles = Kernel::tiles(args);
  const auto blocks = static_cast<unsigned>(tiles < kMaxBlocks ? tiles : kMaxBlocks);
  const DeviceGuard guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    run<Kernel><<<blocks, Kernel::kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
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

}  // namespace sliderquant::cuda
