// Checkpoint packing to kernel layout: a thread per word of the result, which gathers its codes. Runs once per weight,
// on the GPU because the weight is there already.
#pragma once

#include "../args.h"
#include "../layout.h"
#include "ptx.cuh"

namespace sliderquant::cuda {

struct RepackKernel {
  static constexpr int kThreads = 256;

  static int64_t blocks(const Repack& a) {
    return (layout::gpu::packed_words(a.bits, a.n, a.k) + kThreads - 1) / kThreads;
  }

  SLIDERQUANT_DEVICE static void run(const Repack& a, int64_t block, int thread) {
    const int64_t index = block * kThreads + thread;
    if (index >= layout::gpu::packed_words(a.bits, a.n, a.k)) return;
    const auto family = a.pairs ? layout::Family::kPairs : layout::Family::kQuads;
    ptx::store(a.packed + index, layout::gpu::packed_word(a.stream, family, a.bits, a.n, a.k, index));
  }
};

}  // namespace sliderquant::cuda
