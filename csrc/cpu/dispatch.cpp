// Chooses the kernels once per process.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "api.h"
#include "features.h"

namespace sliderquant::cpu {
namespace {

#define SLIDERQUANT_OF(isa)                                                                                    \
  Kernels {                                                                                                    \
    isa::wna16, isa::quantize, isa::rms_norm_quantize, isa::silu_mul_quantize, isa::hadamard,                  \
        isa::integer_gemm, isa::repack, isa::column_sums, isa::fake_quantize, isa::fake_quantize_backward      \
  }
#ifdef SLIDERQUANT_X86
Kernels with_tiles(Kernels kernels) {
  kernels.wna16 = amx::wna16;
  kernels.integer_gemm = amx::integer_gemm;
  return kernels;
}
#endif

const std::pair<const char*, Kernels> kTable[] = {
#ifdef SLIDERQUANT_X86
    {"amx", with_tiles(SLIDERQUANT_OF(avx512))},
    {"avx512", SLIDERQUANT_OF(avx512)},
    {"avx512f", SLIDERQUANT_OF(avx512f)},
    {"avx2", SLIDERQUANT_OF(avx2)},
#endif
    {"portable", SLIDERQUANT_OF(portable)},
};
#undef SLIDERQUANT_OF

const Kernels* find(const std::string& isa) {
  return &std::find_if(std::begin(kTable), std::end(kTable), [&](const auto& row) { return row.first == isa; })->second;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = selected.load(std::memory_order_relaxed);
  if (chosen == nullptr) {
    chosen = find(choose_isa(std::getenv("SLIDERQUANT_ISA")));
    selected.store(chosen, std::memory_order_relaxed);
  }
  return *chosen;
}

}  // namespace sliderquant::cpu

// For tests, which compare the instruction sets within one process: selects one by name ("" for the default) and
// returns 0, or 1 where this machine cannot run it.
extern "C" __attribute__((visibility("default"))) int sliderquant_select_isa(const char* isa) {
  using namespace sliderquant::cpu;
  try {
    selected.store(find(choose_isa(isa)), std::memory_order_relaxed);
    return 0;
  } catch (const std::runtime_error&) {
    return 1;
  }
}
