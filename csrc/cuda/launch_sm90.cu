// Launches the kernels for sm_90a: the tokens' image, and the product, which begins while that is being made.
#include "launch_on.cuh"
#include "launch_sm90.h"
#include "sm90_integer.cuh"
#include "sm90_tokens.cuh"
#include "sm90_wna16.cuh"

namespace sliderquant::cuda {
namespace {

// Other architectures get empty kernels: where none for sm_90a are built, launch.cu says that no GPU can run them.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SLIDERQUANT_ON_SM90A(...) __VA_ARGS__
#else
#define SLIDERQUANT_ON_SM90A(...)
#endif

__global__ void __launch_bounds__(TokensKernel::kThreads) run_tokens(const __grid_constant__ Tokens tokens) {
  SLIDERQUANT_ON_SM90A(__shared__ __align__(16) char shared[TokensKernel::kSharedBytes];
                       TokensKernel::run(tokens, blockIdx.x, static_cast<int>(threadIdx.x), shared);)
}

template <class Kernel, class Args, class Blocks>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    run_sm90(const __grid_constant__ Args args, const __grid_constant__ Blocks blocks) {
  SLIDERQUANT_ON_SM90A(extern __shared__ __align__(1024) char shared[];
                       Kernel::run(args, blocks, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x),
                                   static_cast<int>(threadIdx.x), shared);)
}

template <class Kernel, class Args, class Blocks>
const char* launch_sm90(const Args& args, const Tokens& tokens, const Blocks& blocks, int processors, int device,
                        uintptr_t stream) {
  static std::atomic<uint64_t> asked{0};
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto kernel = run_sm90<Kernel, Args, Blocks>;
  cudaError_t error = cudaSuccess;
  const char* launched = launch_on(device, [&] {
    error = ask_for_shared(kernel, Kernel::kSharedBytes, device, asked);
    if (error != cudaSuccess) return;
    run_tokens<<<static_cast<unsigned>(TokensKernel::blocks(tokens)), TokensKernel::kThreads, 0, on>>>(tokens);
    constexpr int kCluster = Sm90Tile::kCluster;
    const int64_t works = Kernel::kTile.works(args.m, args.n, blocks.splits), clusters = processors / kCluster;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = kCluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    // Weights may be on their way before the image is made; only that is waited for.
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = static_cast<unsigned>(kCluster * (works < clusters ? works : clusters));
    config.blockDim = Kernel::kThreads;
    config.dynamicSmemBytes = Kernel::kSharedBytes;
    config.stream = on;
    config.attrs = attributes;
    config.numAttrs = 2;
    error = cudaLaunchKernelEx(&config, kernel, args, blocks);
  });
  return error == cudaSuccess ? launched : cudaGetErrorString(error);
}

template <int kBits, Float kType, bool kGroups>
const char* launch_wna16(const Wna16& a, const Tokens& tokens, const Sm90Wna16Blocks& blocks, int block_tokens,
                         int processors, int device, uintptr_t stream) {
  switch (block_tokens) {
    case 64:
      return launch_sm90<Sm90Wna16<kBits, kType, kGroups, 64>>(a, tokens, blocks, processors, device, stream);
    case 96:
      return launch_sm90<Sm90Wna16<kBits, kType, kGroups, 96>>(a, tokens, blocks, processors, device, stream);
    default:
      return launch_sm90<Sm90Wna16<kBits, kType, kGroups, 128>>(a, tokens, blocks, processors, device, stream);
  }
}

template <int kBits>
const char* launch_integer(const IntegerGemm& a, const Tokens& tokens, const Sm90IntegerBlocks& blocks,
                           int block_tokens, int processors, int device, uintptr_t stream) {
  switch (block_tokens) {
    case 64: return launch_sm90<Sm90Integer<kBits, 64>>(a, tokens, blocks, processors, device, stream);
    case 96: return launch_sm90<Sm90Integer<kBits, 96>>(a, tokens, blocks, processors, device, stream);
    default: return launch_sm90<Sm90Integer<kBits, 128>>(a, tokens, blocks, processors, device, stream);
  }
}

}  // namespace

const char* wna16_sm90(const Wna16& a, const Plan& plan, float* workspace, int processors, int device,
                       uintptr_t stream) {
  const Sm90Workspace sizes = sm90_workspace(a);
  float* magnitudes = sizes.magnitudes > 0 ? workspace + sizes.image : nullptr;
  const Tokens tokens = {a.x, a.x_stride, a.m, a.k, 2, workspace, a.scale, magnitudes, a.k / a.group, a.n};
  const Sm90Wna16Blocks blocks = {plan.splits, workspace, magnitudes, workspace + sizes.arranged()};
  const bool groups = a.group != a.k;
  const auto launch = layout::with_bits(a.bits, [&](auto bits) {
    return a.x_type == Float::kFp16
               ? (groups ? launch_wna16<bits, Float::kFp16, true> : launch_wna16<bits, Float::kFp16, false>)
               : (groups ? launch_wna16<bits, Float::kBf16, true> : launch_wna16<bits, Float::kBf16, false>);
  });
  return launch(a, tokens, blocks, plan.tokens, processors, device, stream);
}

const char* integer_gemm_sm90(const IntegerGemm& a, const Plan& plan, uint32_t* workspace, int processors, int device,
                              uintptr_t stream) {
  const Tokens tokens = {a.codes, a.k, a.m, a.k, 1, workspace, nullptr, nullptr, 0, a.n};
  const Sm90IntegerBlocks blocks = {plan.splits, workspace, nullptr, workspace + sm90_workspace(a).arranged()};
  const auto launch = layout::with_bits(a.bits, [](auto bits) { return launch_integer<bits>; });
  return launch(a, tokens, blocks, plan.tokens, processors, device, stream);
}

}  // namespace sliderquant::cuda
