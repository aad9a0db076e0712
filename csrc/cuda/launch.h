// The CUDA kernels as plain functions: no torch here and no CUDA header, so that anything can call them.
#pragma once

#include <cstdint>

#include "../args.h"
#include "dispatch.h"

namespace sliderquant::cuda {

// Each enqueues its work on a stream (a cudaStream_t as an integer) of a device and returns the text of a CUDA error,
// or null. All pointers are of that device.
const char* wna16(const Wna16&, const Wna16Plan&, float* workspace, int device, uintptr_t stream);
const char* quantize(const Quantize&, int device, uintptr_t stream);
const char* integer_gemm(const IntegerGemm&, int device, uintptr_t stream);
const char* repack(const Repack&, int device, uintptr_t stream);


// How wna16 makes this product, SLIDERQUANT_CUDA_WNA16 considered. Throws std::runtime_error where that says nothing
// valid, or CUDA nothing about the device.
Wna16Plan plan_wna16(const Wna16&, int device);

// fp32 elements of workspace that wna16 needs, uninitialized.
inline int64_t workspace_size(const Wna16& a, const Wna16Plan& plan) {
  return plan.splits > 1 ? plan.splits * a.m * a.n : 0;
}

}  // namespace sliderquant::cuda
