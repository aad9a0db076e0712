// Launches the kernels of rows.cuh.
#include "launch.h"
#include "launch_on.cuh"
#include "rows.cuh"

namespace sliderquant::cuda {
namespace {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMostThreads, 1) run_row(const __grid_constant__ typename Kernel::Args args) {
  extern __shared__ __align__(16) char shared_rows[];
  Kernel::run(args, static_cast<int>(blockDim.x), blockIdx.x, static_cast<int>(threadIdx.x), shared_rows);
}

template <class Kernel>
const char* launch_row(const typename Kernel::Args& args, const RowsPlan& plan, int64_t m, int device,
                       uintptr_t stream) {
  const auto bytes = static_cast<size_t>(Kernel::shared_bytes(args, plan));
  return launch_on(device, [&] {
    run_row<Kernel><<<static_cast<unsigned>(m), static_cast<unsigned>(plan.threads), bytes,
                      reinterpret_cast<cudaStream_t>(stream)>>>(args);
  });
}

template <class Row>
const char* launch_rows(const typename Row::Args& args, int device, uintptr_t stream) {
  const auto& sizes = Row::sizes(args);
  const RowsPlan plan = plan_rows(sizes.m, sizes.k, sizes.block, gpu(device).processors);
  switch (plan.runs) {
    case 1: return launch_row<RowKernel<Row, 1>>(args, plan, sizes.m, device, stream);
    case 2: return launch_row<RowKernel<Row, 2>>(args, plan, sizes.m, device, stream);
    default: return launch_row<RowKernel<Row, 4>>(args, plan, sizes.m, device, stream);
  }
}

template <template <Float> class Row, class Args>
const char* launch_halves(const Args& args, Float type, int device, uintptr_t stream) {
  return type == Float::kFp16 ? launch_rows<Row<Float::kFp16>>(args, device, stream)
                              : launch_rows<Row<Float::kBf16>>(args, device, stream);
}

}  // namespace

const char* quantize(const Quantize& args, int device, uintptr_t stream) {
  return launch_halves<QuantizeRow>(args, args.x_type, device, stream);
}

const char* rms_norm_quantize(const RmsNormQuantize& args, int device, uintptr_t stream) {
  return launch_halves<RmsNormRow>(args, args.quantize.x_type, device, stream);
}

const char* silu_mul_quantize(const SiluMulQuantize& args, int device, uintptr_t stream) {
  return launch_halves<SiluMulRow>(args, args.quantize.x_type, device, stream);
}

const char* hadamard(const Hadamard& args, int device, uintptr_t stream) {
  if (args.type == Float::kFp32) return launch_rows<HadamardRow<Float::kFp32>>(args, device, stream);
  return launch_halves<HadamardRow>(args, args.type, device, stream);
}

}  // namespace sliderquant::cuda
