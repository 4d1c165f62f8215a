// The kernels for AVX-512 with products of bfloat16 pairs.
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

// Only what follows may use AVX512_BF16: an inline function of a shared header, compiled for it here, could be the
// copy that the linker keeps for older machines too.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")
#endif

#include "simd_avx512.h"

#include "lanes_cpu.h"
#include "lanes_avx512.h"
#include "panel_cpu.h"

#include "kernels_cpu.h"

#include "parts_avx512.h"
#include "pairs_avx512.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace emocore {

static bool usable() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Intel's cores take a pair's product every other cycle, and a float32 one twice a cycle.
static bool worthwhile() { return usable() && !__builtin_cpu_is("intel"); }

const Kernels avx512_bf16_kernels = with(table("avx512_bf16", usable, worthwhile), gram_bfloat16, peak_of_pairs);

}  // namespace emocore
#endif
