// Tokens into the image that the sm90_* kernels copy whole (sm90_tile.h), and what scales of fp16 weights are divided
// by. The image costs one pass over the tokens and frees the products of everything that x can be: of odd strides, of
// tails of K, of the permutation of k and of the swizzle.
#pragma once

#include "ptx.cuh"
#include "ptx_sm90.cuh"
#include "sm90_tile.h"

namespace sliderquant::cuda {

struct Tokens {
  const void* x;  // [m, k], rows `stride` elements apart
  int64_t stride, m, k;
  int element_bytes;
  void* image;
  // For fp16 weights with groups: of each channel, a power of two that no scale exceeds.
  const float* scale;  // [groups, n]
  float* magnitude;    // [n], null where not wanted
  int64_t groups, n;
};

struct TokensKernel {
  static constexpr int kThreads = 256;
  static constexpr int kChannels = 32, kSlices = kThreads / kChannels;  // of a block that looks at scales
  static constexpr int kSharedBytes = kThreads * 4;

  SLIDERQUANT_HOST_DEVICE static int64_t token_blocks(const Tokens& a) {
    return (image::padded_m(a.m) * blocks_of_row(a.k) + kThreads - 1) / kThreads;
  }
  SLIDERQUANT_HOST_DEVICE static int64_t blocks(const Tokens& a) {
    return token_blocks(a) + (a.magnitude != nullptr ? (a.n + kChannels - 1) / kChannels : 0);
  }

  SLIDERQUANT_DEVICE static void run(const Tokens& a, int64_t block, int thread, char* shared) {
    ptx::let_next_grid_begin();
    const int64_t channels = block - token_blocks(a);
    if (channels >= 0) {
      measure(a, channels * kChannels + thread % kChannels, thread, reinterpret_cast<float*>(shared));
    } else if (a.element_bytes == 2) {
      arrange<uint16_t>(a, block * kThreads + thread);
    } else {
      arrange<uint8_t>(a, block * kThreads + thread);
    }
  }

 private:
  SLIDERQUANT_HOST_DEVICE static int64_t blocks_of_row(int64_t k) {
    return layout::gpu::chunks(k) * (layout::gpu::kChunkCodes / layout::kBlockCodes);
  }

  // 32 k of a token: zeros where there is no token or no such k.
  template <class Element>
  SLIDERQUANT_DEVICE static void arrange(const Tokens& a, int64_t index) {
    constexpr int kSize = sizeof(Element), kWords = layout::kBlockCodes * kSize / 4, kUnits = kWords / 4;
    const int64_t m = index / blocks_of_row(a.k), block = index % blocks_of_row(a.k), k = block * layout::kBlockCodes;
    const int64_t m_padded = image::padded_m(a.m);
    if (m >= m_padded) return;
    uint32_t words[kWords] = {};
    if (m < a.m && k < a.k) {
      const auto* x_gl_rd = static_cast<const Element*>(a.x) + m * a.stride + k;
      if (reinterpret_cast<uintptr_t>(x_gl_rd) % 16 == 0) {
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          const Vec4 held = ptx::load_vector(reinterpret_cast<const Vec4*>(x_gl_rd) + unit);
#pragma unroll
          for (int i = 0; i < 4; ++i) words[4 * unit + i] = held.v[i];
        }
      } else {
#pragma unroll
        for (int i = 0; i < layout::kBlockCodes; ++i) {
          words[i * kSize / 4] |= static_cast<uint32_t>(ptx::load(x_gl_rd + i)) << 8 * kSize * (i % (4 / kSize));
        }
      }
    }
    constexpr int kBlocks = image::kRowBytes / (layout::kBlockCodes * kSize);  // of a column
    Vec4 units[kUnits];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int place = image::word_place(kSize, w);
      units[place / 4].v[place % 4] = words[w];
    }
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int within = static_cast<int>(block % kBlocks) * kUnits + unit;
      ptx::store(reinterpret_cast<Vec4*>(static_cast<char*>(a.image) +
                                         image::unit_place(m_padded, m, block / kBlocks, within)),
                 units[unit]);
    }
  }

  // Slices of the groups side by side, for there may be hundreds of them.
  SLIDERQUANT_DEVICE static void measure(const Tokens& a, int64_t n, int thread, float* found) {
    float largest = 0;
    if (n < a.n) {
#pragma unroll 4
      for (int64_t group = thread / kChannels; group < a.groups; group += kSlices) {
        const float scale = bits_to_float(float_to_bits(ptx::load(a.scale + group * a.n + n)) & 0x7FFFFFFF);
        if (scale > largest) largest = scale;
      }
    }
    found[thread] = largest;
    ptx::sync_threads();
    if (thread >= kChannels || n >= a.n) return;
    for (int slice = 1; slice < kSlices; ++slice) {
      if (found[slice * kChannels + thread] > largest) largest = found[slice * kChannels + thread];
    }
    // The next power of two, while that is a number whose reciprocal is one.
    const uint32_t exponent = float_to_bits(largest) >> 23;
    ptx::store(a.magnitude + n, bits_to_float((exponent < 1 ? 1 : exponent < 252 ? exponent + 1 : 252) << 23));
  }
};

}  // namespace sliderquant::cuda
