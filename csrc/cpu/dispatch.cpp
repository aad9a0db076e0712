// Chooses the kernels once per process.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "api.h"
#include "features.h"

namespace sliderquant::cpu {
namespace {

const Kernels kPortable = {portable::wna16, portable::quantize, portable::integer_gemm};
#ifdef SLIDERQUANT_X86
const Kernels kAvx512 = {avx512::wna16, avx512::quantize, avx512::integer_gemm};
#endif

const Kernels* find(const std::string& isa) {
#ifdef SLIDERQUANT_X86
  if (isa == "avx512") return &kAvx512;
#endif
  return &kPortable;
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
