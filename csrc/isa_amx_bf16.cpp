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

#include "kernels_cpu.h"

#include "parts_avx512.h"
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
    return has_avx512() && has_amx_bf16() && tiles_granted();
}

const Kernels amx_bf16_kernels = with(table("amx_bf16", usable, usable), gram_bfloat16, peak_of_tiles);

}  // namespace emocore
#endif
