// Runs the phases of a kernel class on the device and launches it.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#include "integer_gemm.cuh"
#include "launch.h"
#include "quantize.cuh"
#include "repack.cuh"
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

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    run_sm80(const __grid_constant__ Wna16 args, const __grid_constant__ Wna16Blocks blocks) {
  extern __shared__ __align__(128) char shared[];
  Kernel::run(args, blocks, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

__global__ void __launch_bounds__(Wna16Reduce::kThreads)
    run_reduce(const __grid_constant__ Wna16 args, const __grid_constant__ Wna16Blocks blocks) {
  Wna16Reduce::run(args, blocks, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <int kBits, Float kType, int kTiles>
const char* launch_sm80(const Wna16& args, const Wna16Blocks& blocks, int device, uintptr_t stream) {
  using Kernel = Sm80Wna16<kBits, kType, kTiles>;
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  // More shared memory than by default has to be asked for, once per device.
  static std::atomic<uint64_t> asked{0};
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  cudaError_t error = cudaSuccess;
  const char* launched = launch_on(device, [&] {
    if ((asked.load() & bit) == 0) {
      const auto ask = [&](cudaFuncAttribute attribute, int value) {
        if (error == cudaSuccess) error = cudaFuncSetAttribute(run_sm80<Kernel>, attribute, value);
      };
      ask(cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes);
      ask(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);  // for several blocks
      if (error != cudaSuccess) return;
      asked |= bit;
    }
    const auto grid = static_cast<unsigned>(Kernel::blocks(args, blocks.splits));
    run_sm80<Kernel><<<grid, Kernel::kThreads, Kernel::kSharedBytes, on>>>(args, blocks);
    if (blocks.splits > 1) {
      const auto reducing = static_cast<unsigned>(Wna16Reduce::blocks(args));
      run_reduce<<<reducing, Wna16Reduce::kThreads, 0, on>>>(args, blocks);
    }
  });
  return error == cudaSuccess ? launched : cudaGetErrorString(error);
}

template <int kBits, Float kType>
const char* launch_sm80(const Wna16& args, const Wna16Plan& plan, const Wna16Blocks& blocks, int device,
                        uintptr_t stream) {
  switch (plan.tiles) {
    case 1: return launch_sm80<kBits, kType, 1>(args, blocks, device, stream);
    case 2: return launch_sm80<kBits, kType, 2>(args, blocks, device, stream);
    case 4: return launch_sm80<kBits, kType, 4>(args, blocks, device, stream);
    default: return launch_sm80<kBits, kType, 8>(args, blocks, device, stream);
  }
}

template <Float kType>
const char* launch_sm80(const Wna16& args, const Wna16Plan& plan, const Wna16Blocks& blocks, int device,
                        uintptr_t stream) {
  switch (args.bits) {
    case 2: return launch_sm80<2, kType>(args, plan, blocks, device, stream);
    case 3: return launch_sm80<3, kType>(args, plan, blocks, device, stream);
    case 4: return launch_sm80<4, kType>(args, plan, blocks, device, stream);
    default: return launch_sm80<8, kType>(args, plan, blocks, device, stream);
  }
}

std::vector<Gpu> all_gpus() {
  int count = 0;
  std::vector<Gpu> gpus;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return gpus;
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    Gpu gpu = {};
    bool known = true;
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
      known = known && cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
    };
    ask(&major, cudaDevAttrComputeCapabilityMajor);
    ask(&minor, cudaDevAttrComputeCapabilityMinor);
    ask(&gpu.processors, cudaDevAttrMultiProcessorCount);
    if (!known) return {};
    gpu.arch = 10 * major + minor;
    gpus.push_back(gpu);
  }
  return gpus;
}

}  // namespace

const char* wna16(const Wna16& args, const Wna16Plan& plan, float* workspace, int device, uintptr_t stream) {
  if (!plan.tensor_cores) return launch<Wna16Kernel>(args, device, stream);
  const Wna16Blocks blocks = {plan.splits, workspace};
  return args.x_type == Float::kFp16 ? launch_sm80<Float::kFp16>(args, plan, blocks, device, stream)
                                     : launch_sm80<Float::kBf16>(args, plan, blocks, device, stream);
}

Wna16Plan plan_wna16(const Wna16& args, int device) {
  static const std::vector<Gpu> gpus = all_gpus();
  if (device < 0 || device >= static_cast<int>(gpus.size())) {
    throw std::runtime_error("CUDA knows nothing of device " + std::to_string(device));
  }
  return plan_wna16(args.m, args.n, args.k, args.bits, gpus[static_cast<size_t>(device)],
                    std::getenv("SLIDERQUANT_CUDA_WNA16"));
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
