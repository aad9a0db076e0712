// Marks a function that runs on host and device alike. On the host it is always inlined: emitted out of line, its copy
// compiled for one instruction set could be the one that the linker keeps for all.
#pragma once

#ifdef __CUDACC__
#define SLIDERQUANT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SLIDERQUANT_HOST_DEVICE inline __attribute__((always_inline))
#endif
