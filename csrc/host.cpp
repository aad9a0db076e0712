// `_host`: what this machine's CPU can do, and the layouts' index functions for the tests that walk them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "cpu/features.h"
#include "cpu/peak.h"
#include "cuda/dispatch.h"
#include "layout.h"

namespace py = pybind11;

namespace sliderquant {
namespace {

std::map<std::string, bool> cpu_features() {
  const auto present = cpu::features();
  return {present.begin(), present.end()};
}

double peak(const std::string& kind, double seconds) {
#ifdef SLIDERQUANT_X86
  if (kind == "bf16" || kind == "int8") {
    const bool bf16 = kind == "bf16";
    py::gil_scoped_release release;
    if (cpu::supports("amx")) return bf16 ? cpu::amx::peak_bf16(seconds) : cpu::amx::peak_int8(seconds);
    if (cpu::supports("avx512")) return bf16 ? cpu::avx512::peak_bf16(seconds) : cpu::avx512::peak_int8(seconds);
    if (cpu::supports("avx2") && !cpu::supports("avx512f")) {
      return bf16 ? cpu::avx2::peak_bf16(seconds) : cpu::avx2::peak_int8(seconds);
    }
  }
#endif
  throw py::value_error("peak: expected bf16 or int8 on a machine that runs the amx, avx512 or avx2 kernels, found " +
                        kind);
}

template <class Tile>
py::dict describe(const cuda::Plan& plan, const Tile& tile, int64_t m, int64_t n) {
  py::dict found;
  found["kernel"] = plan.wgmma ? "sm90" : plan.tensor_cores ? "sm80" : "plain";
  if (!plan.tensor_cores) return found;
  found["tokens"] = tile.tokens();
  found["channels"] = tile.rows();
  found["splits"] = plan.splits;
  found["blocks"] = tile.n_tiles(n) * tile.m_tiles(m) * plan.splits;
  found["blocks_per_processor"] = tile.blocks_per_processor();
  found["stages"] = tile.stages();
  found["stage_bytes"] = tile.stage_bytes();
  found["shared_bytes"] = tile.shared_bytes();
  return found;
}

py::dict describe_sm90(const cuda::Plan& plan, const cuda::Sm90Tile& tile, int64_t m, int64_t n) {
  py::dict found = describe(plan, tile, m, n);
  found["cluster"] = +cuda::Sm90Tile::kCluster;
  return found;
}

py::dict plan_wna16(int64_t m, int64_t n, int64_t k, int bits, int arch, int processors, const std::string& text) {
  const auto plan = cuda::plan_wna16(m, n, k, bits, {arch, processors}, text.c_str());
  if (plan.wgmma) return describe_sm90(plan, {bits, plan.tokens, 2}, m, n);
  return describe(plan, cuda::Sm80Tile{bits, plan.tokens / cuda::Sm80Tile::kTileTokens}, m, n);
}

py::dict plan_integer(int64_t m, int64_t n, int64_t k, int bits, int arch, int processors, const std::string& text) {
  const auto plan = cuda::plan_integer(m, n, k, bits, {arch, processors}, text.c_str());
  if (plan.wgmma) return describe_sm90(plan, {bits, plan.tokens, 1}, m, n);
  const cuda::Sm80IntegerTile tile = {bits, plan.tokens};
  py::dict found = describe(plan, tile, m, n);
  if (plan.tensor_cores) found["warps_m"] = tile.warps_m();
  if (plan.tensor_cores) found["panels"] = tile.panels();
  return found;
}

}  // namespace
}  // namespace sliderquant

PYBIND11_MODULE(_host, module) {
  using namespace sliderquant;
  module.def("cpu_features", &cpu_features, "Feature name -> whether this machine has it.");
  module.def("isa", [] { return cpu::choose_isa(std::getenv("SLIDERQUANT_ISA")); },
             "The instruction set that the kernels use in this process.");

  module.def("peak", &peak, py::arg("kind"), py::arg("seconds"),
             "Operations per second of one thread multiplying bf16 or int8 out of registers. Raises ValueError.");

  // The index functions themselves, for the tests that walk them exhaustively.
  module.def("period_words", &layout::period_words, py::arg("bits"));
  module.def("period_codes", &layout::period_codes, py::arg("bits"));
  module.def(
      "kernel_bit",
      [](bool pairs, int bits, int j, int b) {
        return layout::kernel_bit(pairs ? layout::Family::kPairs : layout::Family::kQuads, bits, j, b);
      },
      py::arg("pairs"), py::arg("bits"), py::arg("j"), py::arg("b"));
  module.def("word_index", &layout::word_index, py::arg("bits"), py::arg("in_features"), py::arg("n"), py::arg("p"),
             py::arg("d"));
  module.def("packed_words", &layout::packed_words, py::arg("bits"), py::arg("out_features"), py::arg("in_features"));
  module.def(
      "stream_code",
      [](const py::array_t<int32_t, py::array::c_style>& row, int bits, int64_t k) {
        return layout::stream_code(reinterpret_cast<const uint32_t*>(row.data()), bits, k);
      },
      py::arg("row"), py::arg("bits"), py::arg("k"));

  // The same of the layout of GPUs, whose repacking is a CUDA kernel over packed_word.
  py::module_ gpu = module.def_submodule("gpu");
  gpu.def("packed_words", &layout::gpu::packed_words, py::arg("bits"), py::arg("out_features"), py::arg("in_features"));
  gpu.def("owner", &layout::gpu::owner, py::arg("k"));
  gpu.def("run_index", &layout::gpu::run_index, py::arg("k"));
  gpu.def("word_index", &layout::gpu::word_index, py::arg("bits"), py::arg("in_features"), py::arg("n"),
          py::arg("chunk"), py::arg("t"), py::arg("d"));
  gpu.def("vector_words", &layout::gpu::vector_words, py::arg("bits"));
  gpu.def("plan_wna16", &plan_wna16, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("arch"),
          py::arg("processors"), py::arg("override") = "",
          "The kernel that wna16_gemm takes on such a GPU (80 for sm_80), and its sizes. Raises RuntimeError.");
  gpu.def("plan_integer", &plan_integer, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("arch"),
          py::arg("processors"), py::arg("override") = "", "The same of w4a4_gemm.");
}
