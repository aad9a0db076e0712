// The CPU kernels and who runs them. No torch header here or in any kernel: plain pointers and sizes, so that a kernel
// builds in seconds and can be tested from anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "../args.h"
#include "../layout.h"
#include "../numeric.h"

namespace sliderquant::cpu {

// Runs body(begin, end) over disjoint ranges that cover [0, count); the host framework's threads, or none.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using Parallel = void (*)(int64_t count, int64_t grain, RangeBody body, void* context);

template <class Body>
void parallel_for(Parallel parallel, int64_t count, int64_t grain, const Body& body) {
  parallel(
      count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Of the output channels of a product, in panels.
struct Panels {
  int64_t begin, end;
};

inline Panels all_panels(int64_t out_features) { return {0, layout::panels(out_features)}; }

struct Kernels {
  void (*wna16)(const Wna16&, Panels, Parallel);
  void (*quantize)(const Quantize&, Parallel);
  void (*rms_norm_quantize)(const RmsNormQuantize&, Parallel);
  void (*silu_mul_quantize)(const SiluMulQuantize&, Parallel);
  void (*hadamard)(const Hadamard&, Parallel);
  void (*integer_gemm)(const IntegerGemm&, Panels, Parallel);
  void (*repack)(const Repack&, Parallel);
  void (*column_sums)(const ColumnSums&, Parallel);
  void (*fake_quantize)(const FakeQuantize&, Parallel);
  void (*fake_quantize_backward)(const FakeQuantizeBackward&, Parallel);
};

#define SLIDERQUANT_KERNELS(isa)                                         \
  namespace isa {                                                        \
  void wna16(const Wna16&, Panels, Parallel);                            \
  void quantize(const Quantize&, Parallel);                              \
  void rms_norm_quantize(const RmsNormQuantize&, Parallel);              \
  void silu_mul_quantize(const SiluMulQuantize&, Parallel);              \
  void hadamard(const Hadamard&, Parallel);                              \
  void integer_gemm(const IntegerGemm&, Panels, Parallel);               \
  void repack(const Repack&, Parallel);                                  \
  void column_sums(const ColumnSums&, Parallel);                         \
  void fake_quantize(const FakeQuantize&, Parallel);                     \
  void fake_quantize_backward(const FakeQuantizeBackward&, Parallel);    \
  }
SLIDERQUANT_KERNELS(portable)
SLIDERQUANT_KERNELS(avx2)
SLIDERQUANT_KERNELS(avx512f)
SLIDERQUANT_KERNELS(avx512)  // with VNNI and BF16
#undef SLIDERQUANT_KERNELS

namespace amx {  // in everything else like avx512
void wna16(const Wna16&, Panels, Parallel);
void integer_gemm(const IntegerGemm&, Panels, Parallel);
}  // namespace amx

// The kernels of the selected instruction set. Throws std::runtime_error where the request cannot be met.
const Kernels& kernels();

// A product per expert, by those kernels; m counts the tokens of all of them. Rows of y that meet no expert become 0.
void wna16_grouped(const Wna16&, const Experts&, Parallel);
void integer_gemm_grouped(const IntegerGemm&, const Experts&, Parallel);

// 64-byte aligned scratch of a thread; contents do not survive the next call of the same thread.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64})));
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  size_t size_ = 0;
};

}  // namespace sliderquant::cpu
