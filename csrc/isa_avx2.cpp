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

#include "gram_cpu.h"
#include "label_sums_cpu.h"
#include "project_operands_cpu.h"
#include "project_tiles_cpu.h"
#include "project_few_cpu.h"
#include "project_cpu.h"
#include "pool_scores_cpu.h"
#include "row_scores_cpu.h"
#include "stage_cpu.h"
#include "steer_cpu.h"
#include "steer_slots_cpu.h"
#include "steer_sets_cpu.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace emocore {

static bool usable() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

const Kernels avx2_kernels = {
    "avx2", usable, usable, stage, label_sums, gram, project, pool_scores, steer_add, steer_slots, steer_edit};

}  // namespace emocore
#endif
