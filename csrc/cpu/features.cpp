#include "features.h"

#if defined(SLIDERQUANT_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <stdexcept>

namespace sliderquant::cpu {
namespace {

struct Isa {
  const char* name;
  std::vector<const char*> needs;
};

// Asks the system, once per process, to let it use tile registers, whose 8 KB make every signal frame larger.
bool tiles_permitted() {
#if defined(SLIDERQUANT_X86) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

// Best first. A new instruction set is one row here, one in dispatch.cpp, and a rung in CMakeLists.txt.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> table = {
#ifdef SLIDERQUANT_X86
      {"amx",
       {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16", "amx-tile", "amx-int8", "amx-bf16",
        "amx-permitted"}},
      {"avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16"}},
      {"avx512f", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}},
      {"avx2", {"avx2", "fma"}},
#endif
      {"portable", {}},
  };
  return table;
}

}  // namespace

std::vector<std::pair<std::string, bool>> features() {
#ifdef SLIDERQUANT_X86
  __builtin_cpu_init();
#define SLIDERQUANT_FEATURE(name) {name, __builtin_cpu_supports(name) != 0}
  return {
      SLIDERQUANT_FEATURE("avx2"),       SLIDERQUANT_FEATURE("fma"),        SLIDERQUANT_FEATURE("avx512f"),
      SLIDERQUANT_FEATURE("avx512bw"),   SLIDERQUANT_FEATURE("avx512dq"),   SLIDERQUANT_FEATURE("avx512vl"),
      SLIDERQUANT_FEATURE("avx512vbmi"), SLIDERQUANT_FEATURE("avx512vnni"), SLIDERQUANT_FEATURE("avx512bf16"),
      SLIDERQUANT_FEATURE("amx-tile"),   SLIDERQUANT_FEATURE("amx-int8"),   SLIDERQUANT_FEATURE("amx-bf16"),
      {"amx-permitted", __builtin_cpu_supports("amx-tile") && tiles_permitted()},
  };
#undef SLIDERQUANT_FEATURE
#else
  return {};
#endif
}

bool supports(const std::string& isa) {
  const auto present = features();
  const auto has = [&](const char* need) {
    return std::any_of(present.begin(), present.end(), [&](const auto& f) { return f.first == need && f.second; });
  };
  return std::any_of(isas().begin(), isas().end(), [&](const Isa& row) {
    return row.name == isa && std::all_of(row.needs.begin(), row.needs.end(), has);
  });
}

std::string choose_isa(const char* request) {
  std::string usable;
  for (const Isa& row : isas()) {
    if (!supports(row.name)) continue;
    if (request == nullptr || *request == '\0' || request == std::string(row.name)) return row.name;
    usable += (usable.empty() ? "" : ", ") + std::string(row.name);
  }
  throw std::runtime_error("SLIDERQUANT_ISA: this machine and build run one of [" + usable + "], found '" +
                           request + "'; unset it to take the fastest");
}

}  // namespace sliderquant::cpu
