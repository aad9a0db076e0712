// W*A16, the plain kernel: correct everywhere, the reference for faster ones. fp32 throughout.
#pragma once

#include "../formula.h"
#include "gemm_tile.cuh"

namespace sliderquant::cuda {

class Wna16Kernel {
 public:
  using Args = Wna16;
  static constexpr int kThreads = GemmTile::kThreads;

  struct Shared {
    float x[GemmTile::kTokens][GemmTile::kStep];
    float w[GemmTile::kStep][GemmTile::kChannels];
  };

  SLIDERQUANT_HOST_DEVICE static int64_t tiles(const Args& a) { return GemmTile::tiles(a.m, a.n); }
  SLIDERQUANT_HOST_DEVICE static int64_t steps(const Args& a) { return a.k / GemmTile::kStep; }

  SLIDERQUANT_HOST_DEVICE Wna16Kernel(const Args& args, int64_t tile, int thread)
      : a_(args), tile_(args.n, tile, thread) {}

  SLIDERQUANT_HOST_DEVICE void stage(Shared& shared, int64_t step) const {
    const int64_t k0 = step * GemmTile::kStep;
    for (int i = 0; i < GemmTile::kInputsPerThread; ++i) {
      const int r = tile_.input(i) / GemmTile::kStep, j = tile_.input(i) % GemmTile::kStep;
      const int64_t m = tile_.m0 + r;
      shared.x[r][j] = m < a_.m ? load_float(a_.x, a_.x_type, m * a_.x_stride + k0 + j) : 0;
    }
    const int64_t n = tile_.n0 + tile_.channel();
    const bool exists = n < a_.n;
    const int64_t at = k0 / a_.group * a_.n + n;
    const float scale = exists ? a_.scale[at] : 0;
    const uint32_t zero = exists && a_.zero != nullptr ? a_.zero[at] : 1u << (a_.bits - 1);
    for (int i = 0; i < GemmTile::kCodesPerThread; ++i) {
      const int j = tile_.code(i);
      const float w = exists ? dequantize(code(n, k0 + j), zero, scale) : 0;
      shared.w[j][tile_.channel()] = w;
    }
  }

  SLIDERQUANT_HOST_DEVICE void compute(const Shared& shared, int64_t) {
    for (int j = 0; j < GemmTile::kStep; ++j) {
      const float w = shared.w[j][tile_.channel()];
      for (int s = 0; s < GemmTile::kSums; ++s) sum_[s] += shared.x[tile_.token(s)][j] * w;
    }
  }

  SLIDERQUANT_HOST_DEVICE void finish() const {
    const int64_t n = tile_.n0 + tile_.channel();
    for (int s = 0; s < GemmTile::kSums; ++s) {
      const int64_t m = tile_.m0 + tile_.token(s);
      if (m >= a_.m || n >= a_.n) continue;
      store_float(a_.y, a_.x_type, m * a_.n + n, a_.bias != nullptr ? sum_[s] + a_.bias[n] : sum_[s]);
    }
  }

 private:
  SLIDERQUANT_HOST_DEVICE uint32_t code(int64_t n, int64_t k) const {
    return layout::gpu::code(a_.w, layout::Family::kPairs, a_.bits, a_.k, n, k);
  }

  const Args& a_;
  GemmTile tile_;
  float sum_[GemmTile::kSums] = {};
};

}  // namespace sliderquant::cuda
