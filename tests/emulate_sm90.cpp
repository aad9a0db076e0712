// Runs the kernels for sm_90a on the host (cuda_runner.h): the tokens' image, the products out of it, and the sum of
// blocks that share K. Also the image's maps, for test_cuda_sm90.py.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cuda/sm90_integer.cuh"
#include "../csrc/cuda/sm90_tokens.cuh"
#include "../csrc/cuda/sm90_wna16.cuh"
#include "cuda_runner.h"
#include "emulate_operands.h"
#include "emulate_repack.h"

namespace {

using namespace sliderquant;

std::string error;

// A workspace as a GPU gives it: full of anything, 16-byte aligned.
struct Workspace {
  cuda::Sm90Workspace sizes;
  std::vector<cuda::Vec4> words;

  explicit Workspace(const cuda::Sm90Workspace& sizes)
      : sizes(sizes), words(static_cast<size_t>(sizes.size() / 4 + 1), cuda::Vec4{{~0u, ~0u, ~0u, ~0u}}) {}

  uint32_t* image() { return words.data()->v; }
  float* magnitudes() { return sizes.magnitudes > 0 ? reinterpret_cast<float*>(image() + sizes.image) : nullptr; }
  template <class Sum>
  Sum* partial() {
    return sizes.partial > 0 ? reinterpret_cast<Sum*>(image() + sizes.image + sizes.magnitudes) : nullptr;
  }
};

std::string arrange(const cuda::Tokens& tokens, Workspace& workspace, uint64_t seed) {
  cuda::BlockRunner runner(seed);
  runner.allow(tokens.x, ((tokens.m - 1) * tokens.stride + tokens.k) * tokens.element_bytes);
  runner.allow(tokens.scale, tokens.groups * tokens.n * 4);
  runner.allow(tokens.magnitude, tokens.n * 4, true);
  runner.allow(tokens.image, workspace.sizes.image * 4, true);
  return runner.run(
      cuda::TokensKernel::blocks(tokens), cuda::TokensKernel::kThreads, cuda::TokensKernel::kSharedBytes,
      [&](int64_t block, int thread, char* shared) { cuda::TokensKernel::run(tokens, block, thread, shared); });
}

template <class Kernel, class Reduce, class ReduceBlocks, class Args, class Blocks>
std::string multiply(const Args& a, const Blocks& blocks, Workspace& workspace, cuda::BlockRunner& runner, int grid) {
  runner.allow_behind_grid(workspace.image(), workspace.sizes.image * 4);
  runner.allow_behind_grid(workspace.magnitudes(), workspace.sizes.magnitudes * 4);
  runner.allow(blocks.partial, workspace.sizes.partial * 4, true);
  const int count = grid * cuda::Sm90Tile::kCluster;
  std::string found = runner.run(
      count, Kernel::kThreads, Kernel::kSharedBytes,
      [&](int64_t block, int thread, char* shared) {
        Kernel::run(a, blocks, static_cast<int>(block), count, thread, shared);
      },
      cuda::Sm90Tile::kCluster);
  if (found.empty() && blocks.splits > 1) {
    const ReduceBlocks sums = {blocks.splits, blocks.partial};
    found = runner.run(Reduce::blocks(a), Reduce::kThreads, 0,
                       [&](int64_t block, int thread, char*) { Reduce::run(a, sums, block, thread); });
  }
  return found;
}

template <int kBits, Float kType, bool kGroups, int kTokens>
std::string emulate(const Wna16& a, int splits, int grid, uint64_t seed) {
  Workspace workspace(cuda::sm90_workspace(2, kGroups && kType == Float::kFp16, a.m, a.n, a.k, splits));
  const cuda::Tokens tokens = {a.x,     a.x_stride, a.m, a.k, 2, workspace.image(), a.scale, workspace.magnitudes(),
                               a.k / a.group, a.n};
  const std::string found = arrange(tokens, workspace, seed);
  if (!found.empty()) return found;
  const cuda::Sm90Wna16Blocks blocks = {splits, workspace.image(), workspace.magnitudes(),
                                        workspace.partial<float>()};
  cuda::BlockRunner runner(seed);
  allow_operands(runner, a);
  return multiply<cuda::Sm90Wna16<kBits, kType, kGroups, kTokens>, cuda::Wna16Reduce, cuda::Wna16Blocks>(
      a, blocks, workspace, runner, grid);
}

template <int kBits, Float kType>
std::string emulate(const Wna16& a, int64_t tokens, int splits, int grid, uint64_t seed) {
  const auto of_tokens = [&](auto of_groups, auto per_channel) {
    return a.group != a.k ? of_groups(a, splits, grid, seed) : per_channel(a, splits, grid, seed);
  };
  switch (tokens) {
    case 64: return of_tokens(emulate<kBits, kType, true, 64>, emulate<kBits, kType, false, 64>);
    case 96: return of_tokens(emulate<kBits, kType, true, 96>, emulate<kBits, kType, false, 96>);
    default: return of_tokens(emulate<kBits, kType, true, 128>, emulate<kBits, kType, false, 128>);
  }
}

template <Float kType>
std::string emulate(const Wna16& a, int64_t tokens, int splits, int grid, uint64_t seed) {
  switch (a.bits) {
    case 2: return emulate<2, kType>(a, tokens, splits, grid, seed);
    case 3: return emulate<3, kType>(a, tokens, splits, grid, seed);
    case 4: return emulate<4, kType>(a, tokens, splits, grid, seed);
    default: return emulate<8, kType>(a, tokens, splits, grid, seed);
  }
}

template <int kBits, int kTokens>
std::string emulate(const IntegerGemm& a, int splits, int grid, uint64_t seed) {
  Workspace workspace(cuda::sm90_workspace(1, false, a.m, a.n, a.k, splits));
  const cuda::Tokens tokens = {a.codes, a.k, a.m, a.k, 1, workspace.image(), nullptr, nullptr, 0, a.n};
  const std::string found = arrange(tokens, workspace, seed);
  if (!found.empty()) return found;
  const cuda::Sm90IntegerBlocks blocks = {splits, workspace.image(), nullptr, workspace.partial<uint32_t>()};
  cuda::BlockRunner runner(seed);
  allow_operands(runner, a);
  return multiply<cuda::Sm90Integer<kBits, kTokens>, cuda::IntegerReduce, cuda::IntegerBlocks>(a, blocks, workspace,
                                                                                               runner, grid);
}

template <int kBits>
std::string emulate(const IntegerGemm& a, int64_t tokens, int splits, int grid, uint64_t seed) {
  switch (tokens) {
    case 64: return emulate<kBits, 64>(a, splits, grid, seed);
    case 96: return emulate<kBits, 96>(a, splits, grid, seed);
    default: return emulate<kBits, 128>(a, splits, grid, seed);
  }
}

}  // namespace

extern "C" {

const char* emulate_sm90_wna16(const uint16_t* x, int64_t fp16, int64_t x_stride, const uint32_t* w,
                               const float* scale, const uint8_t* zero, const float* bias, uint16_t* y, int64_t m,
                               int64_t n, int64_t k, int64_t group, int64_t bits, int64_t tokens, int64_t splits,
                               int64_t grid, int64_t seed) {
  const Wna16 a = {x,    fp16 ? Float::kFp16 : Float::kBf16, x_stride, w, scale, zero, bias, y, m, n, k, group,
                   static_cast<int>(bits)};
  const auto of_type = fp16 ? emulate<Float::kFp16> : emulate<Float::kBf16>;
  error = of_type(a, tokens, static_cast<int>(splits), static_cast<int>(grid), static_cast<uint64_t>(seed));
  return error.c_str();
}

const char* emulate_sm90_integer(const uint8_t* codes, const float* sa, const int32_t* za, const int32_t* row_sum,
                                 const uint32_t* w, const float* sw, const uint8_t* zw, const int32_t* col_sum,
                                 const float* bias, void* y, int64_t y_type, int64_t m, int64_t n, int64_t k,
                                 int64_t bits, int64_t tokens, int64_t splits, int64_t grid, int64_t seed) {
  const IntegerGemm a = {codes, sa,   za, row_sum, w, sw, zw, col_sum, bias, y, static_cast<Float>(y_type), m, n, k,
                         static_cast<int>(bits)};
  const auto of_bits = bits == 2 ? emulate<2> : bits == 3 ? emulate<3> : bits == 4 ? emulate<4> : emulate<8>;
  error = of_bits(a, tokens, static_cast<int>(splits), static_cast<int>(grid), static_cast<uint64_t>(seed));
  return error.c_str();
}

// image [bytes] of x [m, k] of 1 or 2 bytes each, rows `stride` apart
const char* emulate_image(const void* x, int64_t stride, int64_t m, int64_t k, int64_t element_bytes, void* image,
                          int64_t seed) {
  Workspace workspace(cuda::sm90_workspace(static_cast<int>(element_bytes), false, m, 1, k, 1));
  const cuda::Tokens tokens = {x, stride, m, k, static_cast<int>(element_bytes), workspace.image(), nullptr, nullptr, 0,
                               1};
  error = arrange(tokens, workspace, static_cast<uint64_t>(seed));
  std::memcpy(image, workspace.image(), static_cast<size_t>(workspace.sizes.image * 4));
  return error.c_str();
}

// [n] from scale [groups, n]
const char* emulate_magnitudes(const float* scale, int64_t groups, int64_t n, float* magnitudes, int64_t seed) {
  Workspace workspace(cuda::sm90_workspace(2, true, 1, n, 32, 1));
  const uint16_t x[32] = {};
  const cuda::Tokens tokens = {x, 32, 1, 32, 2, workspace.image(), scale, workspace.magnitudes(), groups, n};
  error = arrange(tokens, workspace, static_cast<uint64_t>(seed));
  std::memcpy(magnitudes, workspace.magnitudes(), static_cast<size_t>(n) * 4);
  return error.c_str();
}

int64_t image_bytes(int64_t element_bytes, int64_t m, int64_t k) {
  return cuda::image::bytes(static_cast<int>(element_bytes), m, k);
}

// The share `index` of the work, of one block of the cluster: m0, n0, split, chunk0, chunks
void work(int64_t tokens, int64_t m, int64_t n, int64_t k, int64_t splits, int64_t index, int64_t rank,
          int64_t* found) {
  const cuda::Sm90Tile tile = {4, static_cast<int>(tokens), 2};
  const cuda::Sm90Work share = cuda::sm90_work(tile, m, n, k, static_cast<int>(splits), static_cast<int>(index),
                                               static_cast<int>(rank));
  const int fields[] = {share.m0, share.n0, share.split, share.chunk0, share.chunks};
  for (int i = 0; i < 5; ++i) found[i] = fields[i];
}

}  // extern "C"
