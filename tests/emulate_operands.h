// What products read and write, but for their tokens, as memory that a block may touch, for the emulators.
#pragma once

#include "../csrc/args.h"
#include "../csrc/layout.h"
#include "cuda_runner.h"

namespace sliderquant {

// As often as there are experts, each tensor of a weight.
inline void allow_operands(cuda::BlockRunner& runner, const Wna16& a, int64_t experts = 1) {
  const int64_t scales = experts * (a.k / a.group) * a.n;
  runner.allow(a.w, experts * layout::gpu::packed_words(a.bits, a.n, a.k) * 4);
  runner.allow(a.scale, scales * 4);
  runner.allow(a.zero, scales);
  runner.allow(a.bias, experts * a.n * 4);
  runner.allow(a.y, a.m * a.n * 2, true);
}

inline void allow_operands(cuda::BlockRunner& runner, const IntegerGemm& a, int64_t experts = 1) {
  for (const void* of_token : {static_cast<const void*>(a.sa), static_cast<const void*>(a.za),
                               static_cast<const void*>(a.row_sum)}) {
    runner.allow(of_token, a.m * 4);
  }
  runner.allow(a.w, experts * layout::gpu::packed_words(a.bits, a.n, a.k) * 4);
  for (const void* of_channel : {static_cast<const void*>(a.sw), static_cast<const void*>(a.col_sum),
                                 static_cast<const void*>(a.bias)}) {
    runner.allow(of_channel, experts * a.n * 4);
  }
  runner.allow(a.zw, experts * a.n);
  runner.allow(a.y, a.m * a.n * (a.y_type == Float::kFp32 ? 4 : 2), true);
}

inline void allow_tokens(cuda::BlockRunner& runner, const Wna16& a) {
  runner.allow(a.x, ((a.m - 1) * a.x_stride + a.k) * 2);
}

inline void allow_tokens(cuda::BlockRunner& runner, const IntegerGemm& a) { runner.allow(a.codes, a.m * a.k); }

}  // namespace sliderquant
