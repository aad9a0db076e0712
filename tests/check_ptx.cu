// The bodies of ptx_bodies.cuh as kernels: what the compiler makes of them is checked everywhere, and what a GPU
// computes is compared with the host versions where there is one.
#include <cuda_runtime.h>

#include <cstring>

#include "ptx_bodies.cuh"

namespace sliderquant::cuda::selftest {

template <class Body>
__global__ void kernel(const __grid_constant__ Words words) {
  __shared__ Vec4 shared[kSharedBytes / 16];
  Body::run(words, static_cast<int>(threadIdx.x), reinterpret_cast<char*>(shared));
}

#define SLIDERQUANT_INSTANTIATE(NAME) template __global__ void kernel<NAME>(const __grid_constant__ Words);
SLIDERQUANT_PTX_BODIES(SLIDERQUANT_INSTANTIATE)

}  // namespace sliderquant::cuda::selftest

using namespace sliderquant::cuda;

// a [32][4], b [32][2], c [32][4] -> d [32][4] on the device that is current; the text of a CUDA error, empty if none.
extern "C" const char* run_ptx(const char* name, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d,
                               int64_t) {
  constexpr int kOperand = 4 * kWarp;
  uint32_t* device = nullptr;
  cudaError_t error = cudaMalloc(&device, 4 * kOperand * sizeof *device);
  const auto copy = [&](void* to, const void* from, size_t words, cudaMemcpyKind kind) {
    if (error == cudaSuccess) error = cudaMemcpy(to, from, words * sizeof *device, kind);
  };
  copy(device, a, kOperand, cudaMemcpyHostToDevice);
  copy(device + kOperand, b, kOperand / 2, cudaMemcpyHostToDevice);
  copy(device + 2 * kOperand, c, kOperand, cudaMemcpyHostToDevice);
  const selftest::Words words = {device, device + kOperand, device + 2 * kOperand, device + 3 * kOperand};
#define SLIDERQUANT_LAUNCH(NAME) \
  if (error == cudaSuccess && std::strcmp(name, #NAME) == 0) selftest::kernel<selftest::NAME><<<1, kWarp>>>(words);
  SLIDERQUANT_PTX_BODIES(SLIDERQUANT_LAUNCH)
  if (error == cudaSuccess) error = cudaGetLastError();
  copy(d, words.d, kOperand, cudaMemcpyDeviceToHost);
  cudaFree(device);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
