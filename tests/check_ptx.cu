// The bodies of ptx_bodies.cuh and ptx_sm90_bodies.cuh as kernels: what the compiler makes of them is checked
// everywhere, and what a GPU computes is compared with the host versions where there is one.
#include <cuda_runtime.h>

#include <cstring>

#include "ptx_bodies.cuh"
#include "ptx_sm90_bodies.cuh"

namespace sliderquant::cuda::selftest {

template <class Body>
__global__ void kernel(const __grid_constant__ Words words) {
  __shared__ Vec4 shared[kSharedBytes / 16];
  Body::run(words, static_cast<int>(threadIdx.x), reinterpret_cast<char*>(shared));
}

#define SLIDERQUANT_INSTANTIATE(NAME) template __global__ void kernel<NAME>(const __grid_constant__ Words);
SLIDERQUANT_PTX_BODIES(SLIDERQUANT_INSTANTIATE)

}  // namespace sliderquant::cuda::selftest

namespace sliderquant::cuda::selftest90 {

// Empty but on sm_90a.
template <class Body>
__global__ void kernel(const __grid_constant__ Words words) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ __align__(swizzled::kAtomBytes) char shared[kSharedBytes];
  Body::run(words, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x), shared);
#endif
}

template <class Body>
void launch(const Words& words) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kBlocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = kBlocks;
  config.blockDim = kThreads;
  config.attrs = &cluster;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel<Body>, words);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
SLIDERQUANT_PTX_SM90_BODIES(SLIDERQUANT_INSTANTIATE)
#endif

}  // namespace sliderquant::cuda::selftest90

using namespace sliderquant::cuda;

// Operands of the named body, so many words each, through memory of the device that is current.
template <class Launch>
static const char* run_on_device(const uint32_t* const (&given)[3], const size_t (&sizes)[4], uint32_t* d,
                                 const Launch& launch) {
  uint32_t* device = nullptr;
  cudaError_t error = cudaMalloc(&device, (sizes[0] + sizes[1] + sizes[2] + sizes[3]) * sizeof *device);
  uint32_t* held[4] = {device};
  for (int i = 1; i < 4; ++i) held[i] = held[i - 1] + sizes[i - 1];
  for (int i = 0; i < 3 && error == cudaSuccess; ++i) {
    error = cudaMemcpy(held[i], given[i], sizes[i] * sizeof *device, cudaMemcpyHostToDevice);
  }
  if (error == cudaSuccess) error = cudaMemcpy(held[3], d, sizes[3] * sizeof *device, cudaMemcpyHostToDevice);
  if (error == cudaSuccess) launch(held);
  if (error == cudaSuccess) error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(d, held[3], sizes[3] * sizeof *device, cudaMemcpyDeviceToHost);
  cudaFree(device);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// a [32][4], b [32][2], c [32][4] -> d [32][4] on the device that is current; the text of a CUDA error, empty if none.
extern "C" const char* run_ptx(const char* name, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d,
                               int64_t) {
  constexpr size_t kOperand = 4 * kWarp;
  return run_on_device({a, b, c}, {kOperand, kOperand / 2, kOperand, kOperand}, d, [&](uint32_t* const(&held)[4]) {
    const selftest::Words words = {held[0], held[1], held[2], held[3]};
#define SLIDERQUANT_LAUNCH(NAME) \
  if (std::strcmp(name, #NAME) == 0) selftest::kernel<selftest::NAME><<<1, kWarp>>>(words);
    SLIDERQUANT_PTX_BODIES(SLIDERQUANT_LAUNCH)
  });
}

// The same of the bodies for sm_90a, whose operands are larger.
extern "C" const char* run_ptx_sm90(const char* name, const uint32_t* a, const uint32_t* b, const uint32_t* c,
                                    uint32_t* d, int64_t) {
  using namespace selftest90;
  constexpr size_t kSumsOfBlock = kThreads * kSums;
  return run_on_device({a, b, c}, {4 * kThreads, 8 * kTokens, kSumsOfBlock, kBlocks * kSumsOfBlock}, d,
                       [&](uint32_t* const(&held)[4]) {
                         const Words words = {held[0], held[1], held[2], held[3]};
#define SLIDERQUANT_LAUNCH_SM90(NAME) \
  if (std::strcmp(name, #NAME) == 0) launch<selftest90::NAME>(words);
                         SLIDERQUANT_PTX_SM90_BODIES(SLIDERQUANT_LAUNCH_SM90)
                       });
}
