// W*A16 of few tokens where bf16 products are slow and integer ones are not.
#pragma once

#include "api.h"

namespace sliderquant::cpu::amx {

constexpr int64_t kFixedPointTokens = 4;

// Up to kFixedPointTokens tokens. False, and nothing is done, where x holds an infinity or a NaN.
bool fixed_point_wna16(const Wna16&, Panels, Parallel);

}  // namespace sliderquant::cpu::amx
