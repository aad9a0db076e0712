// Launches the kernels of grouped.cuh.
#include <cstdlib>
#include <type_traits>

#include "grouped.cuh"
#include "launch.h"
#include "launch_sm80.cuh"

namespace sliderquant::cuda {
namespace {

template <class T>
struct Type {
  using type = T;
};

// launch(Type<the kernel for so many tokens>), of those that plan_wna16_grouped chooses
template <int kBits, Float kType, class Launch>
const char* with_wna16(int tokens, const Launch& launch) {
  switch (tokens) {
    case 8: return launch(Type<Sm80Wna16<kBits, kType, 1>>{});
    case 32: return launch(Type<Sm80Wna16<kBits, kType, 4>>{});
    default: return launch(Type<Sm80Wna16<kBits, kType, 8>>{});
  }
}

template <int kBits, class Launch>
const char* with_integer(int tokens, const Launch& launch) {
  switch (tokens) {
    case 8: return launch(Type<Sm80Integer<kBits, 8>>{});
    case 16: return launch(Type<Sm80Integer<kBits, 16>>{});
    case 32: return launch(Type<Sm80Integer<kBits, 32>>{});
    case 64: return launch(Type<Sm80Integer<kBits, 64>>{});
    default: return launch(Type<Sm80Integer<kBits, 128>>{});
  }
}

}  // namespace

const char* wna16_grouped(const Wna16& gemm, const Experts& experts, const Plan& plan, float* workspace, int device,
                          uintptr_t stream) {
  const GroupedGemm<Wna16> args = {gemm, experts};
  const Wna16Blocks blocks = {plan.splits, workspace};
  const auto launch = [&](auto kernel) {
    using Kernel = GroupedKernel<typename decltype(kernel)::type, Wna16, Wna16Blocks>;
    return launch_sm80<Kernel, GroupedReduce<Wna16Reduce, Wna16, Wna16Blocks>>(args, blocks, device, stream);
  };
  return layout::with_bits(gemm.bits, [&](auto bits) {
    return gemm.x_type == Float::kFp16 ? with_wna16<bits, Float::kFp16>(plan.tokens, launch)
                                       : with_wna16<bits, Float::kBf16>(plan.tokens, launch);
  });
}

const char* integer_gemm_grouped(const IntegerGemm& gemm, const Experts& experts, const Plan& plan,
                                 uint32_t* workspace, int device, uintptr_t stream) {
  const GroupedGemm<IntegerGemm> args = {gemm, experts};
  const IntegerBlocks blocks = {plan.splits, workspace};
  const auto launch = [&](auto kernel) {
    using Kernel = GroupedKernel<typename decltype(kernel)::type, IntegerGemm, IntegerBlocks>;
    return launch_sm80<Kernel, GroupedReduce<IntegerReduce, IntegerGemm, IntegerBlocks>>(args, blocks, device, stream);
  };
  return layout::with_bits(gemm.bits, [&](auto bits) { return with_integer<bits>(plan.tokens, launch); });
}

Plan plan_grouped(const Wna16& args, int64_t experts, int device) {
  return plan_wna16_grouped(args.m, args.n, args.k, args.bits, experts, gpu(device),
                            std::getenv("SLIDERQUANT_CUDA_WNA16"));
}

Plan plan_grouped(const IntegerGemm& args, int64_t experts, int device) {
  return plan_integer_grouped(args.m, args.n, args.k, args.bits, experts, gpu(device),
                              std::getenv("SLIDERQUANT_CUDA_INTEGER"));
}

}  // namespace sliderquant::cuda
