// Ops on the rows of x in one pass: a token in the registers of a block of threads, what is done to it before, the
// Walsh-Hadamard transform, and per-token quantization or a store.
//
// Thread t holds of every kRun * threads values of the row the kRun from kRun * t on: 16 bytes of 16-bit floats, so that
// a warp reads and writes whole lines of memory. The transform's butterflies run from near to far values, as on CPUs, so
// that results are the same bit for bit: within a thread, across the lanes of a warp, and beyond that down columns which
// the threads take from shared memory. Rows longer than what a block holds at a time are made again, part by part, for
// every result that needs all of a row: they are in L2 by then.
//
// Index names: m token; at value of the row; v run of a thread, i value within it.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../args.h"
#include "../formula.h"
#include "../layout.h"
#include "ptx.cuh"
#include "rows_plan.h"

namespace sliderquant::cuda {

static_assert(kWarpValues == kWarp * kRun, "a warp holds a run of every lane side by side");

static_assert(layout::kMostBlock == 16 * kWarpValues, "columns of at most 16 values are what a thread transforms");

using Run = float[kRun];

// Values of a row, in its memory and with as many as exist from `at` on.
template <Float kType>
class RowMemory {
 public:
  using Element = std::conditional_t<kType == Float::kFp32, float, uint16_t>;

  // Rows are stride elements apart, m of them.
  SLIDERQUANT_DEVICE RowMemory(const Element* rows, int64_t stride, int64_t m, int64_t row)
      : values_(rows + row * stride),
        aligned_((reinterpret_cast<uintptr_t>(rows) | (m > 1 ? static_cast<uintptr_t>(stride) * sizeof(Element) : 0)) %
                     16 == 0) {}

  // Zeros for values that do not exist.
  SLIDERQUANT_DEVICE void load(int at, int left, Run& run) const {
    if (aligned_ && left >= kRun) {
      if constexpr (kType == Float::kFp32) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Vec4 held = ptx::load(reinterpret_cast<const Vec4*>(values_ + at + 4 * half));
#pragma unroll
          for (int i = 0; i < 4; ++i) run[4 * half + i] = bits_to_float(held.v[i]);
        }
      } else {
        const Vec4 held = ptx::load(reinterpret_cast<const Vec4*>(values_ + at));
#pragma unroll
        for (int i = 0; i < kRun; i += 2) ptx::widen2<kType>(held.v[i / 2], run[i], run[i + 1]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run[i] = 0;
      if (i >= left) continue;
      if constexpr (kType == Float::kFp32) {
        run[i] = ptx::load(values_ + at + i);
      } else {
        float none;
        ptx::widen2<kType>(ptx::load(values_ + at + i), run[i], none);
      }
    }
  }

  // Rounded to the memory's type.
  SLIDERQUANT_DEVICE void store(int at, int left, const Run& run) const {
    auto* values = const_cast<Element*>(values_) + at;
    if constexpr (kType == Float::kFp32) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec4 held;
#pragma unroll
        for (int i = 0; i < 4; ++i) held.v[i] = float_to_bits(run[4 * half + i]);
        if (aligned_ && left >= kRun) {
          ptx::store(reinterpret_cast<Vec4*>(values + 4 * half), held);
        } else {
          for (int i = 0; i < 4; ++i) {
            if (4 * half + i < left) ptx::store(values + 4 * half + i, run[4 * half + i]);
          }
        }
      }
    } else {
      Vec4 held;
#pragma unroll
      for (int i = 0; i < kRun; i += 2) held.v[i / 2] = ptx::narrow2<kType>(run[i], run[i + 1]);
      if (aligned_ && left >= kRun) {
        ptx::store(reinterpret_cast<Vec4*>(values), held);
        return;
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < left) ptx::store(values + i, static_cast<uint16_t>(held.v[i / 2] >> 16 * (i % 2)));
      }
    }
  }

 private:
  const Element* values_;
  bool aligned_;
};

// Each value rounded to 16 bits.
template <Float kType>
SLIDERQUANT_DEVICE void round_run(Run& run) {
#pragma unroll
  for (int i = 0; i < kRun; i += 2) ptx::widen2<kType>(ptx::narrow2<kType>(run[i], run[i + 1]), run[i], run[i + 1]);
}

// What the kernel below is told: where values come from, and what becomes of them.

template <Float kType>
class QuantizeRow {
 public:
  using Args = Quantize;
  static constexpr bool kNormalizes = false, kQuantizes = true;

  SLIDERQUANT_DEVICE QuantizeRow(const Quantize& a, int64_t m) : x_(a.x, a.x_stride, a.m, m) {}
  SLIDERQUANT_HOST_DEVICE static const Quantize& sizes(const Quantize& a) { return a; }
  SLIDERQUANT_DEVICE void load(int at, int left, Run& run) const { x_.load(at, left, run); }

 private:
  RowMemory<kType> x_;
};

template <Float kType>
class SiluMulRow {
 public:
  using Args = SiluMulQuantize;
  static constexpr bool kNormalizes = false, kQuantizes = true;

  SLIDERQUANT_DEVICE SiluMulRow(const Args& a, int64_t m)
      : gates_(a.quantize.x, a.quantize.x_stride, a.quantize.m, m),
        ups_(a.quantize.x + a.quantize.k, a.quantize.x_stride, a.quantize.m, m) {}
  SLIDERQUANT_HOST_DEVICE static const Quantize& sizes(const Args& a) { return a.quantize; }

  SLIDERQUANT_DEVICE void load(int at, int left, Run& run) const {
    Run up;
    gates_.load(at, left, run);
    ups_.load(at, left, up);
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] = ptx::divide_fast(run[i], 1 + expf(-run[i]));
    round_run<kType>(run);
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] = multiply(run[i], up[i]);
    round_run<kType>(run);
  }

 private:
  RowMemory<kType> gates_, ups_;
};

template <Float kType>
class RmsNormRow {
 public:
  using Args = RmsNormQuantize;
  static constexpr bool kNormalizes = true, kQuantizes = true;

  SLIDERQUANT_DEVICE RmsNormRow(const Args& a, int64_t m)
      : x_(a.quantize.x, a.quantize.x_stride, a.quantize.m, m),
        residual_(a.residual, a.residual_stride, a.quantize.m, m),
        sum_(a.sum, a.quantize.k, a.quantize.m, m),
        weight_(a.weight, 0, 1, 0),
        added_(a.residual != nullptr) {}
  SLIDERQUANT_HOST_DEVICE static const Quantize& sizes(const Args& a) { return a.quantize; }

  SLIDERQUANT_DEVICE void load(int at, int left, Run& run) const {
    x_.load(at, left, run);
    if (!added_) return;
    Run residual;
    residual_.load(at, left, residual);
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] += residual[i];
  }

  SLIDERQUANT_DEVICE void store_sum(int at, int left, const Run& run) const {
    if (added_) sum_.store(at, left, run);
  }

  SLIDERQUANT_DEVICE void normalize(int at, int left, float factor, Run& run) const {
    Run weight;
    weight_.load(at, left, weight);
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] = multiply(run[i], factor);
    round_run<kType>(run);
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] = multiply(run[i], weight[i]);
    round_run<kType>(run);
  }

 private:
  RowMemory<kType> x_, residual_, sum_, weight_;
  bool added_;
};

template <Float kType>
class HadamardRow {
 public:
  using Args = Hadamard;
  using Element = typename RowMemory<kType>::Element;
  static constexpr bool kNormalizes = false, kQuantizes = false;

  SLIDERQUANT_DEVICE HadamardRow(const Hadamard& a, int64_t m)
      : x_(static_cast<const Element*>(a.x), a.k, a.m, m), y_(static_cast<const Element*>(a.y), a.k, a.m, m) {}
  SLIDERQUANT_HOST_DEVICE static const Hadamard& sizes(const Hadamard& a) { return a; }
  SLIDERQUANT_DEVICE void load(int at, int left, Run& run) const { x_.load(at, left, run); }
  SLIDERQUANT_DEVICE void store(int at, int left, const Run& run) const { y_.store(at, left, run); }

 private:
  RowMemory<kType> x_, y_;
};

// token_code without a division for nearly every value. The product with the reciprocal is wrong by less than 255.5 *
// 2^-22, so only where it comes nearer than that to half-way between two codes can the quotient round otherwise.
class TokenCoder {
 public:
  SLIDERQUANT_DEVICE explicit TokenCoder(const TokenGrid& grid) : grid_(grid), reciprocal_(1 / grid.scale) {
    // Where products or the reciprocal might leave the normal floats, everything is divided.
    const bool normal = grid.scale > 1e-30f && grid.scale < 1e30f;
    far_ = normal ? 0.4999f : -1;
  }

  // An integer; NaN gets 0.
  SLIDERQUANT_DEVICE float operator()(float x) const {
    constexpr float kBig = 12582912;  // 1.5 * 2^23: the sum with it is rounded to an integer, half to even
    const float quotient = multiply(x, reciprocal_);
    float steps = (quotient + kBig) - kBig;
    if (!(fabsf(quotient - steps) < far_)) steps = rintf(x / grid_.scale);
    const float code = steps + grid_.zero;
    if (!(code > 0)) return 0;
    return code < grid_.max_code ? code : grid_.max_code;
  }

 private:
  TokenGrid grid_;
  float reciprocal_, far_;
};

template <class Row, int kRuns>
class RowKernel {
 public:
  using Args = typename Row::Args;
  static constexpr int kMostThreads = most_threads(kRuns);
  static constexpr int kMostWarps = kWarp;

  static int64_t shared_bytes(const Args& a, const RowsPlan& plan) {
    return sizeof(Reduced) + plan.exchange_bytes(Row::sizes(a).block);
  }

  SLIDERQUANT_DEVICE static void run(const Args& a, int threads, int64_t m, int thread, char* shared) {
    RowKernel kernel(a, threads, m, thread, shared);
    kernel.run();
  }

 private:
  // What every warp has found.
  struct Reduced {
    float squares[kMostWarps], low[kMostWarps], high[kMostWarps];
    int32_t sum[kMostWarps];
  };
  static_assert(kMostThreads <= kMostWarps * kWarp, "the lanes of a warp read what all warps have found");
  static_assert(sizeof(Reduced) % 16 == 0, "what is exchanged behind it is read 16 bytes at a time");

  static constexpr int kExchanged = kRuns < 2 ? kRuns : 2;  // runs, as RowsPlan has it
  static constexpr int kHeld = kExchanged * kRun;

  SLIDERQUANT_DEVICE RowKernel(const Args& a, int threads, int64_t m, int thread, char* shared)
      : a_(a),
        row_(a, m),
        reduced_(reinterpret_cast<Reduced*>(shared)),
        exchange_(reinterpret_cast<float*>(shared + sizeof(Reduced))),
        m_(m),
        threads_(threads),
        thread_(thread) {}

  // Where this thread's run v begins in a part of the row, and how many of the row's values there are from there on.
  SLIDERQUANT_DEVICE int at(int part, int v) const { return part + (v * threads_ + thread_) * kRun; }
  SLIDERQUANT_DEVICE int left(int part, int v) const { return static_cast<int>(Row::sizes(a_).k) - at(part, v); }

  SLIDERQUANT_DEVICE void run() {
    const auto& sizes = Row::sizes(a_);
    const int held = threads_ * kRuns * kRun, k = static_cast<int>(sizes.k);
    const bool whole = k <= held;
    // Three passes at most: the norm of the row, its range, its values.
    enum { kNorm, kRange, kValues };
    constexpr int kFirst = Row::kNormalizes ? kNorm : Row::kQuantizes ? kRange : kValues;
    constexpr int kReady = Row::kQuantizes ? kRange : kValues;  // the first pass that needs transformed values
    float factor = 1;
    TokenGrid grid = {};
#pragma unroll 1
    for (int pass = kFirst; pass <= kValues; ++pass) {
      float squares = 0, low = 0, high = 0, sum = 0;  // a NaN compares false and does not widen the range
      const TokenCoder coder(grid);
#pragma unroll 1
      for (int part = 0; part < k; part += held) {
        if (pass == kFirst || !whole) {
#pragma unroll
          for (int v = 0; v < kRuns; ++v) row_.load(at(part, v), left(part, v), value_[v]);
        }
        if constexpr (Row::kNormalizes) {
          if (pass == kNorm) {
#pragma unroll
            for (int v = 0; v < kRuns; ++v) {
              row_.store_sum(at(part, v), left(part, v), value_[v]);
#pragma unroll
              for (int i = 0; i < kRun; ++i) squares += multiply(value_[v][i], value_[v][i]);
            }
            continue;
          }
        }
        if (pass == kReady || !whole) prepare(part, factor);
        if constexpr (Row::kQuantizes) {
          if (pass == kRange) {
#pragma unroll
            for (int v = 0; v < kRuns; ++v) {
#pragma unroll
              for (int i = 0; i < kRun; ++i) {
                low = value_[v][i] < low ? value_[v][i] : low;
                high = value_[v][i] > high ? value_[v][i] : high;
              }
            }
          } else {
#pragma unroll
            for (int v = 0; v < kRuns; ++v) sum += store_codes(at(part, v), left(part, v), coder, value_[v]);
          }
        } else {
#pragma unroll
          for (int v = 0; v < kRuns; ++v) row_.store(at(part, v), left(part, v), value_[v]);
        }
      }
      const auto add = [](float one, float other) { return one + other; };
      if constexpr (Row::kNormalizes) {
        if (pass == kNorm) {
          factor = 1 / sqrtf(reduce(squares, reduced_->squares, add) / static_cast<float>(sizes.k) + a_.epsilon);
        }
      }
      if constexpr (Row::kQuantizes) {
        if (pass == kRange) {
          low = reduce(low, reduced_->low, [](float one, float other) { return other < one ? other : one; });
          high = reduce(high, reduced_->high, [](float one, float other) { return other > one ? other : one; });
          grid = token_grid(low, high, sizes.bits, sizes.symmetric);
        } else if (pass == kValues) {
          // A thread's codes add up to less than 2^24, so a float holds their sum.
          const int32_t total = reduce(static_cast<int32_t>(sum), reduced_->sum,
                                       [](int32_t one, int32_t other) { return one + other; });
          if (thread_ == 0) {
            ptx::store(sizes.scale + m_, grid.scale);
            ptx::store(sizes.zero + m_, static_cast<int32_t>(grid.zero));
            ptx::store(sizes.row_sum + m_, total);
          }
        }
      }
    }
  }

  // What quantization or a store takes, from what was loaded.
  SLIDERQUANT_DEVICE void prepare(int part, float factor) {
    if constexpr (Row::kNormalizes) {
#pragma unroll
      for (int v = 0; v < kRuns; ++v) row_.normalize(at(part, v), left(part, v), factor, value_[v]);
    }
    const int64_t block = Row::sizes(a_).block;
    if (block > 1) transform(static_cast<int>(block));
  }

  SLIDERQUANT_DEVICE void transform(int block) {
    const float factor = 1 / sqrtf(static_cast<float>(block));
#pragma unroll
    for (int v = 0; v < kRuns; ++v) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) value_[v][i] = multiply(value_[v][i], factor);
    }
#pragma unroll
    for (int stride = 1; stride < kRun; stride *= 2) {
      if (stride >= block) break;
#pragma unroll
      for (int v = 0; v < kRuns; ++v) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if ((i & stride) == 0) butterfly(value_[v][i], value_[v][i + stride]);
        }
      }
    }
#pragma unroll 1
    for (int mask = 1; mask < kWarp && mask * kRun < block; mask *= 2) {
      const bool upper = (thread_ & mask) != 0;
#pragma unroll
      for (int v = 0; v < kRuns; ++v) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const float other = ptx::shuffle_xor(value_[v][i], mask);
          value_[v][i] = upper ? other - value_[v][i] : other + value_[v][i];
        }
      }
    }
    switch (block / kWarpValues) {
      case 2: return transform_columns<2>();
      case 4: return transform_columns<4>();
      case 8: return transform_columns<8>();
      case 16: return transform_columns<16>();
      default: return;
    }
  }

  // The butterflies that are left, between values of the same place in kSize neighbouring warps' runs: a column, which
  // a thread takes from shared memory whole. What a thread writes there first and reads last is its own, so the next
  // values that come the same way need not wait.
  template <int kSize>
  SLIDERQUANT_DEVICE void transform_columns() {
    if constexpr (kSize <= kHeld) {
      static_assert(kHeld % kSize == 0, "a thread must take whole columns");
#pragma unroll
      for (int first = 0; first < kRuns; first += kExchanged) {
#pragma unroll
        for (int v = 0; v < kExchanged; ++v) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Vec4 held;
#pragma unroll
            for (int i = 0; i < 4; ++i) held.v[i] = float_to_bits(value_[first + v][4 * half + i]);
            *reinterpret_cast<Vec4*>(exchange_ + (v * threads_ + thread_) * kRun + 4 * half) = held;
          }
        }
        ptx::sync_threads();
#pragma unroll
        for (int i = 0; i < kHeld / kSize; ++i) {
          const int column = i * threads_ + thread_;
          float* x_sh = exchange_ + column / kWarpValues * kWarpValues * kSize + column % kWarpValues;
          float values[kSize];
#pragma unroll
          for (int row = 0; row < kSize; ++row) values[row] = x_sh[row * kWarpValues];
#pragma unroll
          for (int stride = 1; stride < kSize; stride *= 2) {
#pragma unroll
            for (int row = 0; row < kSize; ++row) {
              if ((row & stride) == 0) butterfly(values[row], values[row + stride]);
            }
          }
#pragma unroll
          for (int row = 0; row < kSize; ++row) x_sh[row * kWarpValues] = values[row];
        }
        ptx::sync_threads();
#pragma unroll
        for (int v = 0; v < kExchanged; ++v) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto held =
                *reinterpret_cast<const Vec4*>(exchange_ + (v * threads_ + thread_) * kRun + 4 * half);
#pragma unroll
            for (int i = 0; i < 4; ++i) value_[first + v][4 * half + i] = bits_to_float(held.v[i]);
          }
        }
      }
    }
  }

  SLIDERQUANT_DEVICE static void butterfly(float& one, float& other) {
    const float difference = one - other;
    one += other;
    other = difference;
  }

  // Of all threads of the block, in the same order every time.
  template <class T, class Combine>
  SLIDERQUANT_DEVICE T reduce(T value, T* of_warps, const Combine& combine) const {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, ptx::shuffle_xor(value, mask));
    const int lane = thread_ % kWarp;
    if (lane == 0) of_warps[thread_ / kWarp] = value;
    ptx::sync_threads();
    value = lane < threads_ / kWarp ? of_warps[lane] : 0;  // changes neither sums nor ranges, which include 0
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, ptx::shuffle_xor(value, mask));
    return value;
  }

  // Returns the sum of the codes of the values that exist.
  SLIDERQUANT_DEVICE float store_codes(int at, int left, const TokenCoder& coder, const Run& run) const {
    const auto& sizes = Row::sizes(a_);
    uint8_t* codes = sizes.codes + m_ * sizes.k + at;
    Vec2 packed = {};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float code = i < left ? coder(run[i]) : 0;
      sum += code;
      constexpr float kUnit = 8388608;  // 2^23: the mantissa's lowest bit counts 1
      packed.v[i / 4] |= (float_to_bits(code + kUnit) & 0xFF) << 8 * (i % 4);
    }
    if (left >= kRun && reinterpret_cast<uintptr_t>(codes) % sizeof packed == 0) {
      ptx::store(reinterpret_cast<Vec2*>(codes), packed);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < left) ptx::store(codes + i, static_cast<uint8_t>(packed.v[i / 4] >> 8 * (i % 4)));
      }
    }
    return sum;
  }

  const Args& a_;
  Row row_;
  Reduced* reduced_;
  float* exchange_;
  int64_t m_;
  int threads_, thread_;
  float value_[kRuns][kRun];
};

}  // namespace sliderquant::cuda
