// How a product with several weights is cut, of which the host knows all but how many tokens each expert has. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace sliderquant::cuda {

// Tiles of so many tokens that experts may need, whoever has how many of the m tokens: whole ones, and one that is not
// per expert that has any. And one more, so that there is always a block for the rows that meet none.
SLIDERQUANT_HOST_DEVICE int64_t grouped_slots(int64_t m, int64_t experts, int tokens) {
  return m / tokens + (experts < m ? experts : m) + 1;
}

// Tokens of a block by those that an expert has on average: twice as many, because the loads of experts differ and a
// second tile would read their weights again.
inline int grouped_tokens(int64_t m, int64_t experts, int most) {
  const int64_t average = (m + experts - 1) / std::max<int64_t>(experts, 1);
  return least_tokens(average < most ? 2 * average : most, most);
}

template <class MakeTile>
Plan plan_grouped(const char* op, Plan plan, int64_t m, int64_t n, int64_t k, int64_t experts, int most,
                  const Gpu& gpu, const MakeTile& make_tile) {
  if (!plan.tensor_cores) {
    throw std::runtime_error(std::string(op) + ": has no plain kernel, and needs a GPU of sm_80 or later");
  }
  if (plan.wgmma) throw std::runtime_error(std::string(op) + ": has no kernel for sm_90a of its own; ask for sm80");
  if (plan.tokens == 0) plan.tokens = grouped_tokens(m, experts, most);
  const int64_t slots = grouped_slots(m, experts, plan.tokens) - 1;
  return with_splits(plan, make_tile(plan.tokens), slots * plan.tokens, n, k, gpu);
}

inline Plan plan_wna16_grouped(int64_t m, int64_t n, int64_t k, int bits, int64_t experts, const Gpu& gpu,
                               const char* override_text) {
  Plan asked = parse_override("SLIDERQUANT_CUDA_WNA16", kWna16Tokens, gpu.arch >= 80, override_text);
  if (asked.tokens == 0) asked.tokens = grouped_tokens(m, experts, kWna16Tokens);
  // With 16 tokens the kernel takes all registers that two blocks on an SM leave it, and has none for this.
  if (asked.tokens == 16) asked.tokens = 32;
  return plan_grouped("wna16_gemm_grouped", asked, m, n, k, experts, kWna16Tokens, gpu,
                      [&](int tokens) { return Sm80Tile{bits, tokens / Sm80Tile::kTileTokens}; });
}

inline Plan plan_integer_grouped(int64_t m, int64_t n, int64_t k, int bits, int64_t experts, const Gpu& gpu,
                                 const char* override_text) {
  const Plan asked = parse_override("SLIDERQUANT_CUDA_INTEGER", kIntegerTokens, gpu.arch >= 80, override_text);
  return plan_grouped("w4a4_gemm_grouped", asked, m, n, k, experts, kIntegerTokens, gpu,
                      [&](int tokens) { return Sm80IntegerTile{bits, tokens}; });
}

}  // namespace sliderquant::cuda
