// `_host`: repacking checkpoint tensors into kernel layout, and what this machine's CPU can do.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cpu/blocking.h"
#include "cpu/features.h"
#include "cpu/peak.h"
#include "cuda/dispatch.h"
#include "layout.h"

namespace py = pybind11;

namespace sliderquant {
namespace {

using layout::Family;

#ifdef SLIDERQUANT_X86
#define SLIDERQUANT_WIDEST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define SLIDERQUANT_WIDEST
#endif

// Periods of a row that move together, side by side in vector registers: a cache line of words.
constexpr int kRun = 16;

template <int Words>
struct Run {
  uint32_t word[Words][kRun];

  // Those from period p on; beyond the end of the row they are zero codes.
  SLIDERQUANT_INLINE void load(const uint32_t* row, int64_t p, int64_t count) {
    for (int d = 0; d < Words; ++d) {
      for (int i = 0; i < kRun; ++i) word[d][i] = i < count ? row[(p + i) * Words + d] : 0;
    }
  }
};

// Bits that move as one piece from the checkpoint's order to the kernel's.
struct Move {
  uint32_t mask;  // of the piece, at bit 0
  int from_word, from_shift, to_word, to_shift;
};

template <Family family, int bits>
struct Moves {
  Move all[96] = {};
  int count = 0;

  constexpr Moves() {
    int end = -1;  // the kernel bit that would extend the piece
    for (int from = 0; from < 32 * layout::period_words(bits); ++from) {
      const int to = layout::kernel_bit(family, bits, from / bits, from % bits);
      if (to == end && to % 32 != 0 && from % 32 != 0) {
        all[count - 1].mask = all[count - 1].mask << 1 | 1;
      } else {
        all[count++] = {1, from / 32, from % 32, to / 32, to % 32};
      }
      end = to + 1;
    }
  }
};

template <Family family, int bits>
SLIDERQUANT_INLINE inline void repack_panel(const uint32_t* stream, uint32_t* packed, int64_t n_count, int64_t k,
                                            int64_t panel) {
  constexpr int kWords = layout::period_words(bits);
  constexpr Moves<family, bits> moves;
  const int64_t periods = k / layout::period_codes(bits), n0 = panel * layout::kPanelRows;
  const int64_t rows = std::min<int64_t>(layout::kPanelRows, n_count - n0);
  for (int64_t p = 0; p < periods; p += kRun) {
    const int64_t count = std::min<int64_t>(kRun, periods - p);
    uint32_t tile[kWords][kRun][layout::kPanelRows] = {};  // the lanes of a panel are neighbours in memory
    for (int64_t lane = 0; lane < rows; ++lane) {
      Run<kWords> from, to = {};
      from.load(stream + (n0 + lane) * layout::row_words(bits, k), p, count);
      cpu::unroll<moves.count>([&]<int I>() SLIDERQUANT_INLINE {
        constexpr Move move = moves.all[I];
        for (int i = 0; i < kRun; ++i) {
          to.word[move.to_word][i] |= (from.word[move.from_word][i] >> move.from_shift & move.mask) << move.to_shift;
        }
      });
      for (int d = 0; d < kWords; ++d) {
        for (int i = 0; i < kRun; ++i) tile[d][i][lane] = to.word[d][i];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int d = 0; d < kWords; ++d) {
        std::memcpy(packed + layout::word_index(bits, k, n0, p + i, d), tile[d][i], sizeof tile[d][i]);
      }
    }
  }
}

SLIDERQUANT_WIDEST void repack_panels(const uint32_t* stream, uint32_t* packed, Family family, int bits,
                                      int64_t n_count, int64_t k, int64_t begin, int64_t end) {
  const auto run = [&]<Family F, int B>() SLIDERQUANT_INLINE {
    for (int64_t panel = begin; panel < end; ++panel) repack_panel<F, B>(stream, packed, n_count, k, panel);
  };
  const auto choose = [&]<Family F>() SLIDERQUANT_INLINE {
    switch (bits) {
      case 2: return run.template operator()<F, 2>();
      case 3: return run.template operator()<F, 3>();
      case 4: return run.template operator()<F, 4>();
      default: return run.template operator()<F, 8>();
    }
  };
  if (family == Family::kPairs) {
    choose.template operator()<Family::kPairs>();
  } else {
    choose.template operator()<Family::kQuads>();
  }
}

template <int bits>
SLIDERQUANT_INLINE inline int32_t row_sum(const uint32_t* row, int64_t k) {
  constexpr int kWords = layout::period_words(bits);
  const int64_t periods = k / layout::period_codes(bits);
  uint32_t sum[kRun] = {};
  for (int64_t p = 0; p < periods; p += kRun) {
    Run<kWords> from;
    from.load(row, p, std::min<int64_t>(kRun, periods - p));
    cpu::unroll<layout::period_codes(bits)>([&]<int J>() SLIDERQUANT_INLINE {
      constexpr int kWord = J * bits / 32, kShift = J * bits % 32, kNext = kShift + bits > 32 ? 1 : 0;
      for (int i = 0; i < kRun; ++i) {
        uint32_t code = from.word[kWord][i] >> kShift;
        if (kNext) code |= from.word[kWord + kNext][i] << (32 - kShift) % 32;
        sum[i] += code & ((1u << bits) - 1);
      }
    });
  }
  return static_cast<int32_t>(std::accumulate(sum, sum + kRun, 0u));
}

SLIDERQUANT_WIDEST void sum_rows(const uint32_t* stream, int32_t* sums, int bits, int64_t k, int64_t begin,
                                 int64_t end) {
  const auto run = [&]<int B>() SLIDERQUANT_INLINE {
    for (int64_t n = begin; n < end; ++n) sums[n] = row_sum<B>(stream + n * layout::row_words(B, k), k);
  };
  switch (bits) {
    case 2: return run.template operator()<2>();
    case 3: return run.template operator()<3>();
    case 4: return run.template operator()<4>();
    default: return run.template operator()<8>();
  }
}

// run(begin, end) over [0, count), on so many threads.
template <class F>
void in_parallel(int64_t count, int threads, const F& run) {
  std::vector<std::jthread> others;
  for (int t = 1; t < threads; ++t) {
    others.emplace_back([&, t] { run(count * t / threads, count * (t + 1) / threads); });
  }
  run(0, count / threads);
}

template <class T>
py::array allocate(std::vector<py::ssize_t> shape, size_t bytes) {
  // Aligned so that every register of weights is one cache line.
  void* memory = ::operator new(bytes, std::align_val_t{64});
  py::capsule owner(memory, [](void* held) { ::operator delete(held, std::align_val_t{64}); });
  return py::array_t<T>(std::move(shape), static_cast<T*>(memory), owner);
}

std::string shape_of(const py::array& array) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

struct Weight {
  const uint32_t* stream;
  int64_t out_features, in_features;
};

Weight checked(const char* function, const py::array_t<int32_t, py::array::c_style>& weight_packed, int bits,
               int threads) {
  const auto fail = [&](const std::string& message) { throw py::value_error(function + (": " + message)); };
  if (!layout::is_weight_bits(bits)) fail("bits: expected 2, 3, 4 or 8; got " + std::to_string(bits));
  if (threads < 1) fail("threads: expected 1 or more; got " + std::to_string(threads));
  const int64_t in_features = weight_packed.ndim() == 2 ? weight_packed.shape(1) * 32 / bits : 0;
  if (in_features <= 0 || in_features % layout::kBlockCodes != 0) {
    fail("weight_packed: expected [N, K * bits / 32] with K a multiple of " + std::to_string(layout::kBlockCodes) +
         " for bits=" + std::to_string(bits) + "; got " + shape_of(weight_packed));
  }
  return {reinterpret_cast<const uint32_t*>(weight_packed.data()), weight_packed.shape(0), in_features};
}

py::array repack(const py::array_t<int32_t, py::array::c_style>& weight_packed, int bits, int activation_bits,
                 int threads) {
  const Weight w = checked("repack", weight_packed, bits, threads);
  if (activation_bits != 16 && (activation_bits < 2 || activation_bits > 8)) {
    throw py::value_error("repack: activation_bits: expected 16, or 2 to 8; got " + std::to_string(activation_bits));
  }
  // The dtype tells the layouts apart, so that a weight packed for one op is refused by the other.
  const bool pairs = activation_bits == 16;
  const int64_t panels = layout::panels(w.out_features), words = layout::row_words(bits, w.in_features);
  const size_t bytes = static_cast<size_t>(layout::packed_words(bits, w.out_features, w.in_features)) * 4;
  py::array packed = pairs ? allocate<int32_t>({panels, words, layout::kPanelRows}, bytes)
                           : allocate<uint8_t>({panels, words, 4 * layout::kPanelRows}, bytes);
  auto* to = static_cast<uint32_t*>(packed.mutable_data());
  py::gil_scoped_release release;
  in_parallel(panels, threads, [&](int64_t begin, int64_t end) {
    repack_panels(w.stream, to, pairs ? Family::kPairs : Family::kQuads, bits, w.out_features, w.in_features, begin,
                  end);
  });
  return packed;
}

py::array column_sums(const py::array_t<int32_t, py::array::c_style>& weight_packed, int bits, int threads) {
  const Weight w = checked("column_sums", weight_packed, bits, threads);
  py::array_t<int32_t> sums(w.out_features);
  int32_t* to = sums.mutable_data();
  py::gil_scoped_release release;
  in_parallel(w.out_features, threads, [&](int64_t begin, int64_t end) {
    sum_rows(w.stream, to, bits, w.in_features, begin, end);
  });
  return sums;
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
  module.def("repack", &repack, py::arg("weight_packed").noconvert(), py::arg("bits"), py::arg("activation_bits"),
             py::arg("threads"),
             "Checkpoint packing int32 [N, K * bits / 32] -> kernel layout [ceil(N / 32), K * bits / 32, 32] int32 for "
             "16-bit activations, [.., .., 128] uint8 for integer ones.");
  module.def("column_sums", &column_sums, py::arg("weight_packed").noconvert(), py::arg("bits"), py::arg("threads"),
             "Checkpoint packing int32 [N, K * bits / 32] -> the sum of each row's codes, int32 [N].");
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
