// The kernels for AMX with bfloat16 tiles; AVX-512 for all the rest.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

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

// Only what follows may use AMX: an inline function of a shared header, compiled for it here, could be the
// copy that the linker keeps for older machines too.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,amx-tile,amx-bf16")
#endif

#include "simd_avx512.h"

#include "lanes_cpu.h"
#include "lanes_avx512.h"
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
#include "tiles_amx.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace emocore {

// Linux hands out the tile registers on request, once for the whole process.
static bool tiles_granted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, the component of the state
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}

static bool usable() {
    return has_avx512() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           tiles_granted();
}

const Kernels amx_bf16_kernels = {
    "amx_bf16", usable, usable, stage, label_sums, gram_bfloat16, project, pool_scores,
    steer_add, steer_slots, steer_edit};

}  // namespace emocore
#endif
