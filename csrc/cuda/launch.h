// The CUDA kernels as plain functions: no torch here and no CUDA header, so that anything can call them.
#pragma once

#include <cstdint>

#include "../args.h"

namespace sliderquant::cuda {

// Each enqueues its work on a stream (a cudaStream_t as an integer) of a device and returns the text of a CUDA error,
// or null. All pointers are of that device.
const char* wna16(const Wna16&, int device, uintptr_t stream);
const char* quantize(const Quantize&, int device, uintptr_t stream);
const char* integer_gemm(const IntegerGemm&, int device, uintptr_t stream);
const char* repack(const Repack&, int device, uintptr_t stream);

}  // namespace sliderquant::cuda
