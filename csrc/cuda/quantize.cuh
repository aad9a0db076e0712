// Per-token quantization, the plain kernel: one block of threads per token, in the phases that gemm_tile.cuh describes.
// Step 0 finds the range of the row, step 1 makes its codes and their sum.
#pragma once

#include "../formula.h"

namespace sliderquant::cuda {

class QuantizeKernel {
 public:
  using Args = Quantize;
  static constexpr int kThreads = 128;

  struct Shared {
    float low[kThreads], high[kThreads];
    int32_t sum[kThreads];
  };

  SLIDERQUANT_HOST_DEVICE static int64_t tiles(const Args& a) { return a.m; }
  SLIDERQUANT_HOST_DEVICE static int64_t steps(const Args&) { return 2; }

  SLIDERQUANT_HOST_DEVICE QuantizeKernel(const Args& args, int64_t tile, int thread)
      : a_(args), m_(tile), thread_(thread) {}

  SLIDERQUANT_HOST_DEVICE void stage(Shared& shared, int64_t step) const {
    if (step == 0) {
      float low = 0, high = 0;  // a NaN compares false and does not widen the range
      for (int64_t k = thread_; k < a_.k; k += kThreads) {
        const float value = load_float(a_.x, a_.x_type, m_ * a_.x_stride + k);
        if (value < low) low = value;
        if (value > high) high = value;
      }
      shared.low[thread_] = low;
      shared.high[thread_] = high;
    } else {
      int32_t sum = 0;
      for (int64_t k = thread_; k < a_.k; k += kThreads) {
        const float code = token_code(load_float(a_.x, a_.x_type, m_ * a_.x_stride + k), grid_);
        a_.codes[m_ * a_.k + k] = static_cast<uint8_t>(code);
        sum += static_cast<int32_t>(code);
      }
      shared.sum[thread_] = sum;
    }
  }

  // Every thread reads all partial results: the range must reach all of them, and the order is then the same in all.
  SLIDERQUANT_HOST_DEVICE void compute(const Shared& shared, int64_t step) {
    if (step == 0) {
      float low = 0, high = 0;
      for (int i = 0; i < kThreads; ++i) {
        if (shared.low[i] < low) low = shared.low[i];
        if (shared.high[i] > high) high = shared.high[i];
      }
      grid_ = token_grid(low, high, a_.bits, a_.symmetric);
    } else {
      for (int i = 0; i < kThreads; ++i) row_sum_ += shared.sum[i];
    }
  }

  SLIDERQUANT_HOST_DEVICE void finish() const {
    if (thread_ != 0) return;
    a_.scale[m_] = grid_.scale;
    a_.zero[m_] = static_cast<int32_t>(grid_.zero);
    a_.row_sum[m_] = row_sum_;
  }

 private:
  const Args& a_;
  int64_t m_;
  int thread_;
  TokenGrid grid_ = {};
  int32_t row_sum_ = 0;
};

}  // namespace sliderquant::cuda
