// Which instruction set computes: the widest that this machine has, unless forced.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace emocore {

extern const Kernels scalar_kernels;
#ifdef __x86_64__
extern const Kernels avx2_kernels;
#endif

const Kernels& kernels();
std::vector<std::string> usable_isas();
void use_isa(const std::string& name);

}  // namespace emocore
