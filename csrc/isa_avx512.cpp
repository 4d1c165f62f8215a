// The kernels for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

// GCC 12 takes the undefined operands of its own intrinsics for mistakes.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// Only what follows may use AVX-512: an inline function of a shared header, compiled for it here, could be the
// copy that the linker keeps for older machines too.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "simd_avx512.h"

#include "lanes_cpu.h"
#include "lanes_avx512.h"
#include "panel_cpu.h"

#include "kernels_cpu.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace emocore {

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

const Kernels avx512_kernels = table("avx512", has_avx512, has_avx512);

}  // namespace emocore
#endif
