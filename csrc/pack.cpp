// `_host`: repacking checkpoint tensors into kernel layout, and what this machine's CPU can do.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "cpu/features.h"
#include "cpu/peak.h"
#include "cuda/dispatch.h"
#include "layout.h"

namespace py = pybind11;

namespace sliderquant {
namespace {

using layout::Family;

// A run of bits of a period that moves as one piece from the checkpoint's order to the kernel's.
struct Move {
  uint32_t mask;  // of the run, at bit 0
  int from_word, from_shift, to_word, to_shift;
};

std::vector<Move> moves(Family family, int bits) {
  std::vector<Move> result;
  int end = -1;  // the kernel bit that would extend the current run
  for (int from = 0; from < 32 * layout::period_words(bits); ++from) {
    const int to = layout::kernel_bit(family, bits, from / bits, from % bits);
    if (to == end && to % 32 != 0 && from % 32 != 0) {
      result.back().mask = result.back().mask << 1 | 1;
    } else {
      result.push_back({1, from / 32, from % 32, to / 32, to % 32});
    }
    end = to + 1;
  }
  return result;
}

void repack_rows(const uint32_t* stream, uint32_t* packed, Family family, int bits, int64_t n_count, int64_t k) {
  const int words = layout::period_words(bits);
  const int64_t periods = k / layout::period_codes(bits);
  const std::vector<Move> run = moves(family, bits);
  for (int64_t n = 0; n < n_count; ++n) {
    const uint32_t* row = stream + n * layout::row_words(bits, k);
    for (int64_t p = 0; p < periods; ++p) {
      const uint32_t* from = row + p * words;
      uint32_t to[3] = {};
      for (const Move& move : run) {
        to[move.to_word] |= (from[move.from_word] >> move.from_shift & move.mask) << move.to_shift;
      }
      for (int d = 0; d < words; ++d) packed[layout::word_index(bits, k, n, p, d)] = to[d];
    }
  }
}

template <class T>
py::array allocate(std::vector<py::ssize_t> shape, size_t bytes) {
  // Aligned so that every register of weights is one cache line.
  void* memory = ::operator new(bytes, std::align_val_t{64});
  py::capsule owner(memory, [](void* held) { ::operator delete(held, std::align_val_t{64}); });
  std::memset(memory, 0, bytes);
  return py::array_t<T>(std::move(shape), static_cast<T*>(memory), owner);
}

std::string shape_of(const py::array& array) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

py::array repack(const py::array_t<int32_t, py::array::c_style>& weight_packed, int64_t out_features,
                 int64_t in_features, int bits, int activation_bits) {
  const auto fail = [](const std::string& message) { throw py::value_error("repack: " + message); };
  if (!layout::is_weight_bits(bits)) fail("bits: expected 2, 3, 4 or 8; got " + std::to_string(bits));
  if (activation_bits != 16 && (activation_bits < 2 || activation_bits > 8)) {
    fail("activation_bits: expected 16, or 2 to 8; got " + std::to_string(activation_bits));
  }
  if (in_features <= 0 || in_features % layout::kBlockCodes != 0) {
    fail("in_features: expected a multiple of " + std::to_string(layout::kBlockCodes) + "; got " +
         std::to_string(in_features));
  }
  const int64_t words = layout::row_words(bits, in_features);
  if (weight_packed.ndim() != 2 || weight_packed.shape(0) != out_features || weight_packed.shape(1) != words) {
    fail("weight_packed: expected [" + std::to_string(out_features) + ", " + std::to_string(words) + "] for bits=" +
         std::to_string(bits) + ", K=" + std::to_string(in_features) + "; got " + shape_of(weight_packed));
  }
  // The dtype tells the layouts apart, so that a weight packed for one op is refused by the other.
  const bool pairs = activation_bits == 16;
  const int64_t panels = layout::panels(out_features);
  const size_t bytes = static_cast<size_t>(layout::packed_words(bits, out_features, in_features)) * 4;
  py::array packed = pairs ? allocate<int32_t>({panels, words, layout::kPanelRows}, bytes)
                           : allocate<uint8_t>({panels, words, 4 * layout::kPanelRows}, bytes);
  const auto* from = reinterpret_cast<const uint32_t*>(weight_packed.data());
  auto* to = static_cast<uint32_t*>(packed.mutable_data());
  py::gil_scoped_release release;
  repack_rows(from, to, pairs ? Family::kPairs : Family::kQuads, bits, out_features, in_features);
  return packed;
}

std::map<std::string, bool> cpu_features() {
  const auto present = cpu::features();
  return {present.begin(), present.end()};
}

double peak(const std::string& kind, double seconds) {
#ifdef SLIDERQUANT_X86
  if (cpu::supports("avx512") && (kind == "bf16" || kind == "int8")) {
    py::gil_scoped_release release;
    return kind == "bf16" ? cpu::peak_bf16(seconds) : cpu::peak_int8(seconds);
  }
#endif
  throw py::value_error("peak: expected bf16 or int8 on a machine that runs the avx512 kernels, found " + kind);
}

py::dict plan_wna16(int64_t m, int64_t n, int64_t k, int bits, int arch, int processors, const std::string& text) {
  const auto plan = cuda::plan_wna16(m, n, k, bits, {arch, processors}, text.c_str());
  py::dict found;
  found["kernel"] = plan.tensor_cores ? "sm80" : "plain";
  if (!plan.tensor_cores) return found;
  const cuda::Sm80Tile tile = {bits, plan.tiles};
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

}  // namespace
}  // namespace sliderquant

PYBIND11_MODULE(_host, module) {
  using namespace sliderquant;
  module.def("repack", &repack, py::arg("weight_packed").noconvert(), py::arg("out_features"), py::arg("in_features"),
             py::arg("bits"), py::arg("activation_bits"),
             "Checkpoint packing int32 [N, K * bits / 32] -> kernel layout [ceil(N / 32), K * bits / 32, 32] int32 for "
             "16-bit activations, [.., .., 128] uint8 for integer ones.");
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
}
