// Which lane and register of a warp holds which element of a tensor-core product, as PTX defines it for mma.m16n8k16
// (16-bit operands) and mma.m16n8k32 (8-bit operands): A is 16 rows x K, B is K x 8 columns, C is 16 x 8 in 32 bits.
//
// Index names: lane of the warp; i element within the lane's registers, lowest bits of register 0 first.
#pragma once

#include "../portability.h"

namespace sliderquant::cuda::fragment {

constexpr int kRows = 16;    // of A and C
constexpr int kColumns = 8;  // of B and C

struct Place {
  int row, column;
};

// How many elements of so many bits fill a register, and the K of the product of such elements.
SLIDERQUANT_HOST_DEVICE constexpr int per_register(int bits) { return 32 / bits; }
SLIDERQUANT_HOST_DEVICE constexpr int depth(int bits) { return 8 * per_register(bits); }

// Four registers.
SLIDERQUANT_HOST_DEVICE constexpr Place a(int bits, int lane, int i) {
  const int per = per_register(bits), r = i / per;
  return {lane / 4 + 8 * (r % 2), lane % 4 * per + i % per + 4 * per * (r / 2)};
}

// Two registers.
SLIDERQUANT_HOST_DEVICE constexpr Place b(int bits, int lane, int i) {
  const int per = per_register(bits);
  return {lane % 4 * per + i % per + 4 * per * (i / per), lane / 4};
}

// Four registers of one element each.
SLIDERQUANT_HOST_DEVICE constexpr Place c(int lane, int i) { return {lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2}; }

// What ldmatrix puts into a register: two 16-bit elements of an 8 x 8 matrix.
SLIDERQUANT_HOST_DEVICE constexpr Place matrix(int lane, int i) { return {lane / 4, lane % 4 * 2 + i}; }

}  // namespace sliderquant::cuda::fragment
