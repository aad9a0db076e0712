// All kernels in plain C++, for machines without a faster file and as the reference that the faster ones are tested
// against.
//
// Index names: n output channel, panel 32 of them, r channel within it, m token, k input channel, j k within a block.
#include <algorithm>

#include "../formula.h"
#include "api.h"

namespace sliderquant::cpu::portable {
namespace {

using layout::Family;
using layout::kBlockCodes;
using layout::kPanelRows;

// Codes [kBlockCodes, kPanelRows] of one block of a panel.
template <Family family, int Bits>
void decode_block(const uint32_t* w, int64_t in_features, int64_t panel, int64_t k0, uint8_t* codes) {
  constexpr int kCodes = layout::period_codes(Bits);
  for (int j = 0; j < kBlockCodes; ++j) {
    std::fill(codes, codes + kPanelRows, uint8_t{0});
    // A code's bits may lie apart (3 bits), so each is placed on its own; runs of them would only matter for speed.
    for (int b = 0; b < Bits; ++b) {
      const int bit = layout::kernel_bit(family, Bits, j % kCodes, b);
      const uint32_t* words =
          w + layout::word_index(Bits, in_features, panel * kPanelRows, (k0 + j) / kCodes, bit / 32);
      for (int r = 0; r < kPanelRows; ++r) codes[r] |= static_cast<uint8_t>((words[r] >> bit % 32 & 1) << b);
    }
    codes += kPanelRows;
  }
}

using Decode = void (*)(const uint32_t*, int64_t, int64_t, int64_t, uint8_t*);

template <Family family>
Decode decoder(int bits) {
  switch (bits) {
    case 2: return decode_block<family, 2>;
    case 3: return decode_block<family, 3>;
    case 4: return decode_block<family, 4>;
    default: return decode_block<family, 8>;
  }
}

void wna16_panel(const Wna16& a, int64_t panel, float* sums) {
  const Decode decode = decoder<Family::kPairs>(a.bits);
  const int64_t n0 = panel * kPanelRows;
  const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, a.n - n0));
  uint8_t codes[kBlockCodes * kPanelRows];
  float weights[kBlockCodes * kPanelRows];

  std::fill(sums, sums + a.m * kPanelRows, 0.0f);
  for (int64_t k0 = 0; k0 < a.k; k0 += kBlockCodes) {
    decode(a.w, a.k, panel, k0, codes);
    const int64_t at = k0 / a.group * a.n + n0;
    for (int r = 0; r < kPanelRows; ++r) {
      const uint32_t zero = a.zero != nullptr && r < rows ? a.zero[at + r] : 1u << (a.bits - 1);
      const float scale = r < rows ? a.scale[at + r] : 0;
      for (int j = 0; j < kBlockCodes; ++j) {
        weights[j * kPanelRows + r] = dequantize(codes[j * kPanelRows + r], zero, scale);
      }
    }
    for (int64_t m = 0; m < a.m; ++m) {
      float* sum = sums + m * kPanelRows;
      for (int j = 0; j < kBlockCodes; ++j) {
        const float x = load_float(a.x, a.x_type, m * a.x_stride + k0 + j);
        for (int r = 0; r < kPanelRows; ++r) sum[r] += x * weights[j * kPanelRows + r];
      }
    }
  }
  for (int64_t m = 0; m < a.m; ++m) {
    for (int r = 0; r < rows; ++r) {
      const float bias = a.bias != nullptr ? a.bias[n0 + r] : 0;
      store_float(a.y, a.x_type, m * a.n + n0 + r, sums[m * kPanelRows + r] + bias);
    }
  }
}

void integer_panel(const IntegerGemm& a, int64_t panel, uint32_t* sums) {
  const Decode decode = decoder<Family::kQuads>(a.bits);
  const int64_t n0 = panel * kPanelRows;
  const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, a.n - n0));
  uint8_t codes[kBlockCodes * kPanelRows];
  uint16_t weights[kBlockCodes * kPanelRows];

  std::fill(sums, sums + a.m * kPanelRows, 0);
  for (int64_t k0 = 0; k0 < a.k; k0 += kBlockCodes) {
    decode(a.w, a.k, panel, k0, codes);
    // A product of two codes fits 16 bits, for which every vector unit has a multiplication.
    std::copy(codes, codes + kBlockCodes * kPanelRows, weights);
    for (int64_t m = 0; m < a.m; ++m) {
      uint32_t* sum = sums + m * kPanelRows;
      for (int j = 0; j < kBlockCodes; ++j) {
        const uint16_t x = a.codes[m * a.k + k0 + j];
        for (int r = 0; r < kPanelRows; ++r) sum[r] += static_cast<uint16_t>(x * weights[j * kPanelRows + r]);
      }
    }
  }
  for (int64_t m = 0; m < a.m; ++m) {
    for (int r = 0; r < rows; ++r) {
      store_float(a.y, a.y_type, m * a.n + n0 + r, integer_output(a, m, n0 + r, sums[m * kPanelRows + r]));
    }
  }
}

void quantize_row(const Quantize& a, int64_t m) {
  const int64_t row = m * a.x_stride;
  float low = 0, high = 0;  // a NaN compares false and does not widen the range
  for (int64_t k = 0; k < a.k; ++k) {
    const float value = load_float(a.x, a.x_type, row + k);
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const TokenGrid grid = token_grid(low, high, a.bits, a.symmetric);
  int32_t sum = 0;
  for (int64_t k = 0; k < a.k; ++k) {
    const float code = token_code(load_float(a.x, a.x_type, row + k), grid);
    a.codes[m * a.k + k] = static_cast<uint8_t>(code);
    sum += static_cast<int32_t>(code);
  }
  a.scale[m] = grid.scale;
  a.zero[m] = static_cast<int32_t>(grid.zero);
  a.row_sum[m] = sum;
}

}  // namespace

void wna16(const Wna16& a, Parallel parallel) {
  parallel_for(parallel, layout::panels(a.n), 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto* sums = scratch.get<float>(a.m * kPanelRows);
    for (int64_t panel = begin; panel < end; ++panel) wna16_panel(a, panel, sums);
  });
}

void integer_gemm(const IntegerGemm& a, Parallel parallel) {
  parallel_for(parallel, layout::panels(a.n), 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto* sums = scratch.get<uint32_t>(a.m * kPanelRows);
    for (int64_t panel = begin; panel < end; ++panel) integer_panel(a, panel, sums);
  });
}

void quantize(const Quantize& a, Parallel parallel) {
  parallel_for(parallel, a.m, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) quantize_row(a, m);
  });
}

}  // namespace sliderquant::cpu::portable
