// The CUDA kernels as plain functions: no torch here and no CUDA header, so that anything can call them.
#pragma once

#include <cstdint>

#include "../args.h"
#include "dispatch.h"

namespace sliderquant::cuda {

// Each enqueues its work on a stream (a cudaStream_t as an integer) of a device and returns the text of a CUDA error,
// or null. All pointers are of that device.
const char* wna16(const Wna16&, const Plan&, float* workspace, int device, uintptr_t stream);
const char* quantize(const Quantize&, int device, uintptr_t stream);
const char* rms_norm_quantize(const RmsNormQuantize&, int device, uintptr_t stream);
const char* silu_mul_quantize(const SiluMulQuantize&, int device, uintptr_t stream);
const char* hadamard(const Hadamard&, int device, uintptr_t stream);
const char* integer_gemm(const IntegerGemm&, const Plan&, uint32_t* workspace, int device, uintptr_t stream);
const char* wna16_grouped(const Wna16&, const Experts&, const Plan&, float* workspace, int device, uintptr_t stream);
const char* integer_gemm_grouped(const IntegerGemm&, const Experts&, const Plan&, uint32_t* workspace, int device,
                                 uintptr_t stream);
const char* repack(const Repack&, int device, uintptr_t stream);

// Throws std::runtime_error with CUDA's text where it cannot tell.
const Gpu& gpu(int device);

// How a product is made, the environment's override considered. Throws std::runtime_error where that says nothing
// valid, or CUDA cannot tell what the device is.
Plan plan(const Wna16&, int device);
Plan plan(const IntegerGemm&, int device);
Plan plan_grouped(const Wna16&, int64_t experts, int device);
Plan plan_grouped(const IntegerGemm&, int64_t experts, int device);

// 32-bit elements of workspace that the product needs, uninitialized.
inline int64_t workspace_size(const Plan& plan, int64_t m, int64_t n) {
  return plan.arranged + (plan.splits > 1 ? plan.splits * m * n : 0);
}

}  // namespace sliderquant::cuda
