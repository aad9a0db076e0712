// How the kernels of rows.cuh are launched. Plain C++, so that every choice can be looked at.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sliderquant::cuda {

constexpr int kRun = 8;           // neighbouring values that a thread holds: 16 bytes of 16-bit floats
constexpr int kWarpValues = 256;  // of the runs of a warp that stand side by side
constexpr int kMostRuns = 4;      // per thread

// Threads of a block that hold so many runs each: what registers allow.
constexpr int most_threads(int runs) { return runs == 1 ? 1024 : 512; }

// One block of threads per token; it holds threads * runs * kRun values at a time.
struct RowsPlan {
  int threads, runs;

  constexpr int64_t values() const { return int64_t{threads} * runs * kRun; }
  // Runs that are exchanged between warps at a time, for transforms of more values than a warp has side by side.
  constexpr int exchanged() const { return std::min(runs, 2); }
  constexpr int64_t exchange_bytes(int64_t block) const {
    return block > kWarpValues ? int64_t{threads} * exchanged() * kRun * 4 : 0;
  }
};

// Few tokens: as many threads as a token can use, because its time is what one thread takes. Many: few threads with
// more values each, so that barriers of one block are covered by the work of others.
inline RowsPlan plan_rows(int64_t m, int64_t k, int64_t block, int processors) {
  const int fewest_runs = block > 2048 ? 2 : 1;  // the values of a column across warps must be one thread's
  const bool few = m <= 2 * processors;
  RowsPlan plan = {0, kMostRuns};
  while (plan.runs > fewest_runs) {
    const int64_t less = int64_t{plan.runs} / 2 * kRun;
    if (k > less * (few ? most_threads(plan.runs / 2) : 256)) break;
    plan.runs /= 2;
  }
  // Whole warps, and whole blocks of the transform in what is exchanged at a time.
  const int64_t unit = block > kWarpValues ? std::max<int64_t>(32, block / (plan.exchanged() * kRun)) : 32;
  const int64_t needed = (k + plan.runs * kRun - 1) / (plan.runs * kRun);
  plan.threads = static_cast<int>(std::min<int64_t>((needed + unit - 1) / unit * unit, most_threads(plan.runs)));
  return plan;
}

}  // namespace sliderquant::cuda
