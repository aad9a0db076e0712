// How fast one thread multiplies tiles out of registers, for benchmarks: the roof over every kernel for AMX.
#include "amx.h"
#include "fastest.h"
#include "peak.h"

namespace sliderquant::cpu {
namespace {

using namespace amx;

constexpr int kSums = 4;       // as many as the kernels have
constexpr int kRounds = 10000;

// Processors slow down under products of numbers, and not under those of zeros.
template <class Dot>
double peak(double seconds, uint32_t weights, uint32_t tokens, int64_t operations) {
  alignas(64) uint32_t rows[2][kTileRows * layout::kVectorRows];
  for (uint32_t i = 0; i < kTileRows * layout::kVectorRows; ++i) {
    rows[0][i] = tokens ^ (i * 2654435761u & 0x007F007F);
    rows[1][i] = weights ^ (i * 2246822519u & 0x80608060);
  }
  const TileState state(kTileRows);
  load_tile<kTokens0>(rows[0], kRowBytes), load_tile<kTokens1>(rows[0], kRowBytes);
  load_tile<kWeights0>(rows[1], kRowBytes), load_tile<kWeights1>(rows[1], kRowBytes);
  zero_tiles<kSum00, kSums>();
  return operations * kSums * fastest(seconds, kRounds, [] {
    Dot::template add<kSum00, kTokens0, kWeights0>();
    Dot::template add<kSum01, kTokens0, kWeights1>();
    Dot::template add<kSum10, kTokens1, kWeights0>();
    Dot::template add<kSum11, kTokens1, kWeights1>();
  });
}

constexpr int64_t kPositions = kTileRows * layout::kVectorRows;  // of the sums in a tile

}  // namespace

double amx::peak_bf16(double seconds) {
  return peak<DotBf16>(seconds, 0x40004000, 0x3F803F80, 2 * kPositions * kRowBytes / 2);
}

double amx::peak_int8(double seconds) {
  return peak<DotInt8>(seconds, 0x03050709, 0x0A0B0C0D, 2 * kPositions * kRowBytes);
}

}  // namespace sliderquant::cpu
