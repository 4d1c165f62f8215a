// The kernels for AVX2, FMA and F16C.
#ifdef __x86_64__
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

// Only what follows may use AVX2: an inline function of a shared header, compiled for it here, could be the
// copy that the linker keeps for older machines too.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "simd_avx2.h"

#include "lanes_cpu.h"
#include "panel_cpu.h"

#include "kernels_cpu.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace emocore {

static bool usable() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

const Kernels avx2_kernels = table("avx2", usable, usable);

}  // namespace emocore
#endif
