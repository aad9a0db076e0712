// Operations (a multiplication or an addition) per second of one thread, from bursts over so many seconds. For machines
// that run the avx512 kernels.
#pragma once

namespace sliderquant::cpu {

double peak_bf16(double seconds);
double peak_int8(double seconds);

}  // namespace sliderquant::cpu
