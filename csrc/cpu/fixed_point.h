// W*A16 of few tokens where bf16 products, or making bf16 of codes, take long and integer products do not.
#pragma once

#include "api.h"

namespace sliderquant::cpu::avx512 {

constexpr int64_t kFixedPointTokens = 4;

// Up to kFixedPointTokens tokens. False, and nothing is done, where x holds an infinity or a NaN.
bool fixed_point_wna16(const Wna16&, Panels, Parallel);

}  // namespace sliderquant::cpu::avx512
