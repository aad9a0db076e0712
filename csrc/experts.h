// The part of a product that belongs to some of its tokens, and to one of its weights.
#pragma once

#include <cstdint>

#include "args.h"
#include "portability.h"

namespace sliderquant {

// The product for the tokens [begin, begin + count) alone.
SLIDERQUANT_HOST_DEVICE Wna16 of_tokens(Wna16 a, int64_t begin, int64_t count) {
  a.x += begin * a.x_stride;
  a.y += begin * a.n;
  a.m = count;
  return a;
}

SLIDERQUANT_HOST_DEVICE IntegerGemm of_tokens(IntegerGemm a, int64_t begin, int64_t count) {
  a.codes += begin * a.k;
  a.sa += begin;
  a.za += begin;
  a.row_sum += begin;
  a.y = static_cast<char*>(a.y) + begin * a.n * (a.y_type == Float::kFp32 ? 4 : 2);
  a.m = count;
  return a;
}

// The product with the weight of one expert, of which each takes so many words.
SLIDERQUANT_HOST_DEVICE Wna16 of_weight(Wna16 a, int64_t expert, int64_t words) {
  const int64_t groups = a.k / a.group;
  a.w += expert * words;
  a.scale += expert * groups * a.n;
  if (a.zero != nullptr) a.zero += expert * groups * a.n;
  if (a.bias != nullptr) a.bias += expert * a.n;
  return a;
}

SLIDERQUANT_HOST_DEVICE IntegerGemm of_weight(IntegerGemm a, int64_t expert, int64_t words) {
  a.w += expert * words;
  a.sw += expert * a.n;
  if (a.zw != nullptr) a.zw += expert * a.n;
  a.col_sum += expert * a.n;
  if (a.bias != nullptr) a.bias += expert * a.n;
  return a;
}

}  // namespace sliderquant
