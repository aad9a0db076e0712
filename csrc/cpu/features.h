// Which instruction sets this machine has, and which of them the kernels use.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace sliderquant::cpu {

// Name and presence of every feature that a kernel asks for, in a fixed order; empty where the machine is no x86.
std::vector<std::pair<std::string, bool>> features();

// Whether this machine can run the kernels of an instruction set; false for a name that is not one.
bool supports(const std::string& isa);

// The best supported one, or the one that SLIDERQUANT_ISA names. Throws std::runtime_error with the remedy where that
// is unknown or unsupported.
std::string choose_isa(const char* request);

}  // namespace sliderquant::cpu
