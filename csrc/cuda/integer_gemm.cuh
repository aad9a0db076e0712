// Integer GEMM, the plain kernel: exact in 32 bits, the reference for faster ones.
#pragma once

#include "../formula.h"
#include "gemm_tile.cuh"

namespace sliderquant::cuda {

class IntegerGemmKernel {
 public:
  using Args = IntegerGemm;
  static constexpr int kThreads = GemmTile::kThreads;

  struct Shared {
    uint32_t x[GemmTile::kTokens][GemmTile::kStep];
    uint32_t w[GemmTile::kStep][GemmTile::kChannels];
  };

  SLIDERQUANT_HOST_DEVICE static int64_t tiles(const Args& a) { return GemmTile::tiles(a.m, a.n); }
  SLIDERQUANT_HOST_DEVICE static int64_t steps(const Args& a) { return a.k / GemmTile::kStep; }

  SLIDERQUANT_HOST_DEVICE IntegerGemmKernel(const Args& args, int64_t tile, int thread)
      : a_(args), tile_(args.n, tile, thread) {}

  SLIDERQUANT_HOST_DEVICE void stage(Shared& shared, int64_t step) const {
    const int64_t k0 = step * GemmTile::kStep;
    for (int i = 0; i < GemmTile::kInputsPerThread; ++i) {
      const int r = tile_.input(i) / GemmTile::kStep, j = tile_.input(i) % GemmTile::kStep;
      const int64_t m = tile_.m0 + r;
      shared.x[r][j] = m < a_.m ? a_.codes[m * a_.k + k0 + j] : 0;
    }
    const int64_t n = tile_.n0 + tile_.channel();
    for (int i = 0; i < GemmTile::kCodesPerThread; ++i) {
      const int j = tile_.code(i);
      shared.w[j][tile_.channel()] = n < a_.n ? code(n, k0 + j) : 0;
    }
  }

  SLIDERQUANT_HOST_DEVICE void compute(const Shared& shared, int64_t) {
    for (int j = 0; j < GemmTile::kStep; ++j) {
      const uint32_t w = shared.w[j][tile_.channel()];
      for (int s = 0; s < GemmTile::kSums; ++s) sum_[s] += shared.x[tile_.token(s)][j] * w;
    }
  }

  SLIDERQUANT_HOST_DEVICE void finish() const {
    const int64_t n = tile_.n0 + tile_.channel();
    for (int s = 0; s < GemmTile::kSums; ++s) {
      const int64_t m = tile_.m0 + tile_.token(s);
      if (m >= a_.m || n >= a_.n) continue;
      store_float(a_.y, a_.y_type, m * a_.n + n, integer_output(a_, m, n, sum_[s]));
    }
  }

 private:
  SLIDERQUANT_HOST_DEVICE uint32_t code(int64_t n, int64_t k) const {
    return layout::gpu::code(a_.w, layout::Family::kQuads, a_.bits, a_.k, n, k);
  }

  const Args& a_;
  GemmTile tile_;
  uint32_t sum_[GemmTile::kSums] = {};
};

}  // namespace sliderquant::cuda
