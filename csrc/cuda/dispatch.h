// Which kernel makes a product, and how it is cut. Plain C++: runs anywhere, so that every choice can be looked at.
//
// SLIDERQUANT_CUDA_WNA16 and SLIDERQUANT_CUDA_INTEGER override the choice for experiments: plain, or sm80 followed by
// any of :tokens=8|16|32|64 (also 128 for the integer product) and :splits=COUNT, such as sm80:tokens=16:splits=4, or
// sm90 followed by the same, with :tokens=64|96|128, on GPUs of compute capability 9.0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "sm80_tile.h"
#include "sm90_tile.h"

namespace sliderquant::cuda {

struct Gpu {
  int arch;        // 80 for sm_80
  int processors;  // SMs
};

struct Plan {
  bool tensor_cores;  // otherwise the plain kernel
  int tokens;         // that a block takes
  int splits;         // blocks that share the K of the same outputs
  bool wgmma = false;    // the kernels for sm_90a, otherwise those for sm_80 and later
  int64_t arranged = 0;  // 32-bit elements of workspace, before the sums of splits, for the image of the tokens
};

constexpr int kMaxSplits = 64;

// What a split costs, in bytes of weights that one SM reads in the same time. The figures are those of a model, to be
// replaced where a GPU tells otherwise: a block fills its pipeline and writes its sums; the sums of several blocks are
// added up by a kernel of its own, which has to be launched and to read them out of L2, twice as fast as memory.
constexpr int64_t kBlockCost = 40 << 10, kReduceCost = 88 << 10;
// Making the image of the tokens before, by a kernel of its own.
constexpr int64_t kArrangeCost = 66 << 10;
// An SM that has more to do than others reads this much faster than its share, in percent.
constexpr int64_t kOwnPace = 125;

template <class Tile>
constexpr int64_t split_cost(const Tile& tile, int64_t m, int64_t n, int64_t k, const Gpu& gpu, int splits) {
  const int64_t blocks = tile.n_tiles(n) * tile.m_tiles(m) * splits;
  const int64_t bytes = (tile.k_stages(k) + splits - 1) / splits * tile.stage_cost();
  const int64_t busiest = (blocks + gpu.processors - 1) / gpu.processors;
  const int64_t reading = std::max(blocks * bytes / gpu.processors, busiest * bytes * 100 / kOwnPace);
  const int64_t rounds = (busiest + tile.blocks_per_processor() - 1) / tile.blocks_per_processor();
  const int64_t reducing = splits == 1 ? 0 : kReduceCost + splits * m * n * 4 / gpu.processors;
  return reading + rounds * kBlockCost + reducing;
}

// The same of the kernels for sm_90a, whose blocks stay for several shares: by the bytes of weights, by what comes out
// of L2 (a quarter faster than memory), or by the cycles of the tensor cores, in each of which an SM reads 19 bytes.
constexpr int64_t split_cost(const Sm90Tile& tile, int64_t m, int64_t n, int64_t k, const Gpu& gpu, int splits) {
  constexpr int64_t kBytesPerCycle = 19, kShareCost = 20 << 10;
  const int64_t shares = tile.n_tiles(n) * tile.m_tiles(m) * splits, stages = (tile.k_stages(k) + splits - 1) / splits;
  const int64_t busiest = (shares + gpu.processors - 1) / gpu.processors;
  const int64_t weights = stages * tile.weight_bytes(), l2 = stages * tile.fetched_bytes() * 4 / 5;
  const int64_t reading = std::max(shares * std::max(weights, l2) / gpu.processors, busiest * weights * 100 / kOwnPace);
  const int64_t multiplying = busiest * stages * tile.stage_cycles() * kBytesPerCycle;
  const int64_t reducing = splits == 1 ? 0 : kReduceCost + splits * m * n * 4 / gpu.processors;
  return std::max(reading, multiplying) + kBlockCost + busiest * kShareCost + reducing;
}

constexpr int least_tokens(int64_t m, int most) {
  int tokens = 8;
  while (tokens < m && tokens < most) tokens *= 2;
  return tokens;
}

template <class Tile>
constexpr int choose_splits(const Tile& tile, int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  const auto most = static_cast<int>(std::min<int64_t>(tile.k_stages(k), kMaxSplits));
  int best = 1;
  for (int splits = 2; splits <= most; ++splits) {
    if (split_cost(tile, m, n, k, gpu, splits) < split_cost(tile, m, n, k, gpu, best)) best = splits;
  }
  return best;
}

// What an override asks for; zeros where it leaves a choice. Throws std::runtime_error where the text is none.
inline Plan parse_override(const std::string& variable, int most_tokens, bool tensor_cores, const char* text) {
  Plan plan = {tensor_cores, 0, 0};
  std::string rest = text != nullptr ? text : "";
  if (rest.empty()) return plan;
  const auto next = [&rest] {
    const size_t end = std::min(rest.find(':'), rest.size());
    const std::string part = rest.substr(0, end);
    rest.erase(0, std::min(end + 1, rest.size()));
    return part;
  };
  bool valid = false;
  const std::string kernel = next();
  if (kernel == "plain" || kernel == "sm80" || kernel == "sm90") {
    plan.tensor_cores = kernel != "plain";
    plan.wgmma = kernel == "sm90";
    valid = plan.tensor_cores || rest.empty();
  }
  while (valid && !rest.empty()) {
    const std::string part = next();
    const size_t equals = std::min(part.find('='), part.size());
    const std::string name = part.substr(0, equals);
    const int value = std::atoi(part.c_str() + std::min(equals + 1, part.size()));
    if (name == "tokens") {
      valid = plan.wgmma ? value >= Sm90Tile::kLeastTokens && value <= Sm90Tile::kMostTokens &&
                               value % Sm90Tile::kTokenStep == 0
                         : value >= 8 && value <= most_tokens && (value & (value - 1)) == 0;
      plan.tokens = value;
    } else {
      valid = name == "splits" && value >= 1 && value <= kMaxSplits;
      plan.splits = value;
    }
  }
  if (!valid) {
    std::string tokens = "8";
    for (int each = 16; each <= most_tokens; each *= 2) tokens.append("|").append(std::to_string(each));
    throw std::runtime_error(variable + ": expected plain, or sm80 followed by any of :tokens=" + tokens +
                             " and :splits=1.." + std::to_string(kMaxSplits) +
                             ", or sm90 with :tokens=64|96|128; got " + text);
  }
  return plan;
}

// The splits of a plan where it leaves them open, and none of them empty.
template <class Tile>
Plan with_splits(Plan plan, const Tile& tile, int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  if (plan.splits == 0) plan.splits = choose_splits(tile, m, n, k, gpu);
  plan.splits = static_cast<int>(std::min<int64_t>(plan.splits, tile.k_stages(k)));
  return plan;
}

constexpr int kWna16Tokens = 64, kIntegerTokens = 128;  // that a block takes at most

// A plan that is `asked` for, by the kernels for sm_90a.
inline Plan plan_sm90(const Plan& asked, Sm90Tile tile, int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  Plan best = {};
  int64_t least = 0;
  for (int tokens = Sm90Tile::kLeastTokens; tokens <= Sm90Tile::kMostTokens; tokens += Sm90Tile::kTokenStep) {
    if (asked.tokens != 0 && asked.tokens != tokens) continue;
    tile.block_tokens = tokens;
    const Plan plan = with_splits({true, tokens, asked.splits, true}, tile, m, n, k, gpu);
    const int64_t cost = split_cost(tile, m, n, k, gpu, plan.splits);
    if (best.tensor_cores && cost >= least) continue;
    best = plan;
    least = cost;
  }
  return best;
}

// Whether the kernels for sm_90a make a product: where they are asked for, and where nothing is and they cost less than
// `other` of the kernels for sm_80, which have to have more tokens than a block of `few`.
template <class Tile>
bool takes_sm90(const Plan& asked, const std::string& variable, const char* override_text, const Sm90Tile& tile,
                const Tile& other, int few, int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  if (asked.wgmma && gpu.arch != 90) {
    throw std::runtime_error(variable + ": sm90 takes a GPU of compute capability 9.0 and a build for 90a");
  }
  const bool open = override_text == nullptr || *override_text == 0;
  if (!open || gpu.arch != 90) return asked.wgmma;
  if (m <= few) return false;
  const Plan plan = plan_sm90(asked, tile, m, n, k, gpu);
  const int64_t arranging = kArrangeCost + 2 * m * k * tile.element_bytes * 4 / 5 / gpu.processors;
  const int64_t cost =
      split_cost({tile.bits, plan.tokens, tile.element_bytes}, m, n, k, gpu, plan.splits) + arranging;
  return cost < split_cost(other, m, n, k, gpu, choose_splits(other, m, n, k, gpu));
}

inline Plan plan_wna16(int64_t m, int64_t n, int64_t k, int bits, const Gpu& gpu, const char* override_text) {
  const std::string variable = "SLIDERQUANT_CUDA_WNA16";
  Plan plan = parse_override(variable, kWna16Tokens, gpu.arch >= 80, override_text);
  if (!plan.tensor_cores) return {false, 0, 1};
  const Sm90Tile sm90 = {bits, 0, 2};
  const Sm80Tile most = {bits, kWna16Tokens / Sm80Tile::kTileTokens};
  if (takes_sm90(plan, variable, override_text, sm90, most, kWna16Tokens / 2, m, n, k, gpu)) {
    return plan_sm90(plan, sm90, m, n, k, gpu);
  }
  if (plan.tokens == 0) plan.tokens = least_tokens(m, kWna16Tokens);
  return with_splits(plan, Sm80Tile{bits, plan.tokens / Sm80Tile::kTileTokens}, m, n, k, gpu);
}

// Few tokens: as few as hold them. Beyond, two sizes of blocks, whichever costs less.
inline Plan plan_integer(int64_t m, int64_t n, int64_t k, int bits, const Gpu& gpu, const char* override_text) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (m > kMost || n > kMost) {
    throw std::runtime_error("w4a4_gemm: expected at most " + std::to_string(kMost) +
                             " tokens and output channels; got M=" + std::to_string(m) + ", N=" + std::to_string(n));
  }
  const std::string variable = "SLIDERQUANT_CUDA_INTEGER";
  const Plan asked = parse_override(variable, kIntegerTokens, gpu.arch >= 80, override_text);
  if (!asked.tensor_cores) return {false, 0, 1};
  const Sm90Tile sm90 = {bits, 0, 1};
  const Sm80IntegerTile most = {bits, kIntegerTokens};
  if (takes_sm90(asked, variable, override_text, sm90, most, Sm80IntegerTile::kFew, m, n, k, gpu)) {
    return plan_sm90(asked, sm90, m, n, k, gpu);
  }
  const auto of_tokens = [&](int tokens) {
    return with_splits({true, tokens, asked.splits}, Sm80IntegerTile{bits, tokens}, m, n, k, gpu);
  };
  if (asked.tokens != 0) return of_tokens(asked.tokens);
  const Plan few = of_tokens(least_tokens(m, Sm80IntegerTile::kFew));
  if (m <= Sm80IntegerTile::kFew) return few;
  const Plan many = of_tokens(kIntegerTokens);
  const auto cost = [&](const Plan& plan) {
    return split_cost(Sm80IntegerTile{bits, plan.tokens}, m, n, k, gpu, plan.splits);
  };
  return cost(many) <= cost(few) ? many : few;
}

}  // namespace sliderquant::cuda
