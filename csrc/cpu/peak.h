// Operations (a multiplication or an addition) per second of one thread, from bursts over so many seconds. For machines
// that run the kernels of the same name.
#pragma once

namespace sliderquant::cpu {

namespace avx2 {
double peak_bf16(double seconds);
double peak_int8(double seconds);
}  // namespace avx2

namespace avx512 {
double peak_bf16(double seconds);
double peak_int8(double seconds);
}  // namespace avx512

namespace amx {
double peak_bf16(double seconds);
double peak_int8(double seconds);
}  // namespace amx

}  // namespace sliderquant::cpu
