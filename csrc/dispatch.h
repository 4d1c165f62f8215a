// Which instruction set computes: the fastest that this machine has, unless forced.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace emocore {

extern const Kernels scalar_kernels;
#ifdef __x86_64__
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#ifdef __linux__
extern const Kernels amx_bf16_kernels;
#endif
bool has_avx512();

// What not every compiler's __builtin_cpu_supports knows.
bool has_f16c();
bool has_amx_bf16();
#endif

const Kernels& kernels();
std::vector<std::string> usable_isas();
void use_isa(const std::string& name);

}  // namespace emocore
