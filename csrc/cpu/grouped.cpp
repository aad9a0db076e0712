// Products with several weights, by the kernels of the selected instruction set.
//
// The panels of all experts that have tokens are shared out as if they stood in one row, so that all threads have work
// where one token meets eight experts, and every weight is read by one thread alone. A thread calls the kernel once for
// each expert that it has panels of, and that packs the tokens of the expert anew: at most one expert more often than
// there are threads.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "blocking.h"

namespace sliderquant::cpu {
namespace {

// Fetching the weights of a panel takes as long as multiplying them with so many tokens.
constexpr int64_t kFetchTokens = 8;

// Products with one token that are worth a thread.
constexpr int64_t kGrainProducts = 1 << 19;

void in_this_thread(int64_t count, int64_t, RangeBody body, void* context) { body(0, count, context); }

template <class Gemm>
void grouped(const Gemm& a, const Experts& experts, void (*run)(const Gemm&, Panels, Parallel), Parallel parallel) {
  const int64_t panels = layout::panels(a.n), words = layout::packed_words(a.bits, a.n, a.k);
  // visit(expert, tokens, cost of a panel) for each expert that has tokens.
  const auto for_experts = [&](const auto& visit) {
    for (int64_t e = 0; e < experts.count; ++e) {
      const int64_t tokens = experts.offsets[e + 1] - experts.offsets[e];
      if (tokens > 0) visit(e, tokens, kFetchTokens + tokens);
    }
  };
  int64_t total = 0;
  for_experts([&](int64_t, int64_t, int64_t cost) { total += panels * cost; });
  const int64_t grain = (kFetchTokens + 1) * (1 + kGrainProducts / (layout::kPanelRows * a.k));
  parallel_for(parallel, total, grain, [&](int64_t begin, int64_t end) {
    for_experts([&](int64_t e, int64_t tokens, int64_t cost) {
      // A panel belongs to the range that its first unit of cost lies in.
      const auto panel_at = [&](int64_t at) { return std::clamp<int64_t>((at + cost - 1) / cost, 0, panels); };
      const Panels mine = {panel_at(begin), panel_at(end)};
      if (mine.begin < mine.end) {
        run(of_weight(of_tokens(a, experts.offsets[e], tokens), e, words), mine, in_this_thread);
      }
      begin -= panels * cost;
      end -= panels * cost;
    });
  });
  const auto y_from = [&](int64_t m) { return static_cast<char*>(static_cast<void*>(of_tokens(a, m, 0).y)); };
  char* rest = y_from(experts.offsets[experts.count]);
  std::memset(rest, 0, y_from(a.m) - rest);
}

}  // namespace

void wna16_grouped(const Wna16& a, const Experts& experts, Parallel parallel) {
  grouped(a, experts, kernels().wna16, parallel);
}

void integer_gemm_grouped(const IntegerGemm& a, const Experts& experts, Parallel parallel) {
  grouped(a, experts, kernels().integer_gemm, parallel);
}

}  // namespace sliderquant::cpu
