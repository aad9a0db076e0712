// How the plain GEMM kernels cut their work: one block of threads makes kTokens x kChannels outputs, walking K in steps
// of kStep. Written as phases between barriers and without any CUDA construct, so that the same code runs on the host,
// thread after thread, in tests.
//
// Index names: m token, n output channel, k input channel; tile one block's outputs; thread its index in the block;
// c channel within the tile, r token within it, j k within a step.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace sliderquant::cuda {

struct GemmTile {
  static constexpr int kTokens = 16;
  static constexpr int kChannels = 64;
  static constexpr int kStep = layout::kBlockCodes;
  static constexpr int kThreads = 256;
  // A thread sums one channel for every fourth token, so that the lanes of a warp read neighbouring channels of shared
  // memory and one common token.
  static constexpr int kTokenStride = kThreads / kChannels;
  static constexpr int kSums = kTokens / kTokenStride;
  static constexpr int kCodesPerThread = kStep / kTokenStride;
  static constexpr int kInputsPerThread = kTokens * kStep / kThreads;
  static_assert(kThreads % kChannels == 0 && kTokens % kTokenStride == 0, "every thread must have equally many sums");
  static_assert(kStep % kTokenStride == 0 && kTokens * kStep % kThreads == 0, "every thread must stage equally much");
  static_assert(kStep == 32, "a step must lie within one scale group and start on a word of the bit stream");

  SLIDERQUANT_HOST_DEVICE static constexpr int64_t tiles(int64_t m, int64_t n) {
    return (m + kTokens - 1) / kTokens * ((n + kChannels - 1) / kChannels);
  }

  int64_t m0, n0;  // the tile's first token and channel
  int thread;

  SLIDERQUANT_HOST_DEVICE GemmTile(int64_t n, int64_t tile, int thread_index) : thread(thread_index) {
    const int64_t across = (n + kChannels - 1) / kChannels;
    m0 = tile / across * kTokens;
    n0 = tile % across * kChannels;
  }

  SLIDERQUANT_HOST_DEVICE int channel() const { return thread % kChannels; }
  SLIDERQUANT_HOST_DEVICE int token(int sum) const { return thread / kChannels + sum * kTokenStride; }
  SLIDERQUANT_HOST_DEVICE int code(int i) const { return thread / kChannels * kCodesPerThread + i; }
  SLIDERQUANT_HOST_DEVICE int input(int i) const { return thread + i * kThreads; }
};

}  // namespace sliderquant::cuda
