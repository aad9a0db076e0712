// Which kernel makes a product, and how it is cut. Plain C++: runs anywhere, so that every choice can be looked at.
//
// SLIDERQUANT_CUDA_WNA16 overrides the choice for experiments: plain, or sm80 followed by any of :tokens=8|16|32|64 and
// :splits=COUNT, such as sm80:tokens=16:splits=4.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "sm80_tile.h"

namespace sliderquant::cuda {

struct Gpu {
  int arch;        // 80 for sm_80
  int processors;  // SMs
};

struct Wna16Plan {
  bool tensor_cores;  // sm80_wna16.cuh; otherwise the plain kernel
  int tiles;          // of eight tokens that a block takes
  int splits;         // blocks that share the K of the same outputs
};

constexpr int kMaxSplits = 64;

// What a split costs, in bytes of weights that one SM reads in the same time. The figures are those of a model, to be
// replaced where a GPU tells otherwise: a block fills its pipeline and writes its sums; the sums of several blocks are
// added up by a kernel of its own, which has to be launched and to read them out of L2, twice as fast as memory.
constexpr int64_t kBlockCost = 40 << 10, kReduceCost = 88 << 10;
// An SM that has more to do than others reads this much faster than its share, in percent.
constexpr int64_t kOwnPace = 125;

constexpr int64_t split_cost(const Sm80Tile& tile, int64_t m, int64_t n, int64_t k, const Gpu& gpu, int splits) {
  const int64_t blocks = tile.n_tiles(n) * tile.m_tiles(m) * splits;
  const int64_t bytes = (tile.k_stages(k) + splits - 1) / splits * tile.stage_bytes();
  const int64_t busiest = (blocks + gpu.processors - 1) / gpu.processors;
  const int64_t reading = std::max(blocks * bytes / gpu.processors, busiest * bytes * 100 / kOwnPace);
  const int64_t rounds = (busiest + tile.blocks_per_processor() - 1) / tile.blocks_per_processor();
  const int64_t reducing = splits == 1 ? 0 : kReduceCost + splits * m * n * 4 / gpu.processors;
  return reading + rounds * kBlockCost + reducing;
}

constexpr int choose_tiles(int64_t m) { return m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8; }

constexpr int choose_splits(const Sm80Tile& tile, int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  const auto most = static_cast<int>(std::min<int64_t>(tile.k_stages(k), kMaxSplits));
  int best = 1;
  for (int splits = 2; splits <= most; ++splits) {
    if (split_cost(tile, m, n, k, gpu, splits) < split_cost(tile, m, n, k, gpu, best)) best = splits;
  }
  return best;
}

// Throws std::runtime_error where the override is none.
inline Wna16Plan plan_wna16(int64_t m, int64_t n, int64_t k, int bits, const Gpu& gpu, const char* override_text) {
  Wna16Plan plan = {gpu.arch >= 80, choose_tiles(m), 0};
  std::string rest = override_text != nullptr ? override_text : "";
  const auto next = [&rest] {
    const size_t end = std::min(rest.find(':'), rest.size());
    const std::string part = rest.substr(0, end);
    rest.erase(0, std::min(end + 1, rest.size()));
    return part;
  };
  if (!rest.empty()) {
    bool valid = false;
    const std::string kernel = next();
    if (kernel == "plain" || kernel == "sm80") {
      plan.tensor_cores = kernel == "sm80";
      valid = plan.tensor_cores || rest.empty();
    }
    while (valid && !rest.empty()) {
      const std::string part = next();
      const size_t equals = std::min(part.find('='), part.size());
      const std::string name = part.substr(0, equals);
      const int value = std::atoi(part.c_str() + std::min(equals + 1, part.size()));
      if (name == "tokens") {
        valid = value == 8 || value == 16 || value == 32 || value == 64;
        plan.tiles = value / Sm80Tile::kTileTokens;
      } else {
        valid = name == "splits" && value >= 1 && value <= kMaxSplits;
        plan.splits = value;
      }
    }
    if (!valid) {
      throw std::runtime_error("SLIDERQUANT_CUDA_WNA16: expected plain, or sm80 followed by any of "
                               ":tokens=8|16|32|64 and :splits=1..64; got " + std::string(override_text));
    }
  }
  if (!plan.tensor_cores) return {false, 0, 1};
  const Sm80Tile tile = {bits, plan.tiles};
  if (plan.splits == 0) plan.splits = choose_splits(tile, m, n, k, gpu);
  plan.splits = static_cast<int>(std::min<int64_t>(plan.splits, tile.k_stages(k)));  // none may be empty
  return plan;
}

}  // namespace sliderquant::cuda
