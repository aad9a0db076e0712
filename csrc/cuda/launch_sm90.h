// The kernels for sm_90a as plain functions, for launch.cu: all but the sum of the splits.
#pragma once

#include <cstdint>

#include "../args.h"
#include "dispatch.h"
#include "sm90_tile.h"

namespace sliderquant::cuda {

// What they keep in the workspace before the sums of splits.
inline Sm90Workspace sm90_workspace(const Wna16& a) {
  return sm90_workspace(2, a.group != a.k && a.x_type == Float::kFp16, a.m, a.n, a.k, 1);
}
inline Sm90Workspace sm90_workspace(const IntegerGemm& a) { return sm90_workspace(1, false, a.m, a.n, a.k, 1); }

// On a GPU of so many processors; the workspace holds what workspace_size says.
const char* wna16_sm90(const Wna16&, const Plan&, float* workspace, int processors, int device, uintptr_t stream);
const char* integer_gemm_sm90(const IntegerGemm&, const Plan&, uint32_t* workspace, int processors, int device,
                              uintptr_t stream);

}  // namespace sliderquant::cuda
