// What gram_cuda.cu asks of Hopper beyond CUDA C++, an instruction or two a function. Device code only; a test runs the
// kernel on a CPU by putting its own functions of these names here.
#pragma once
#include <cuda.h>

#include "gram_cuda.h"

namespace emocore::gram_cuda {
namespace {

// --- the block and its cluster

// The first byte of dynamic shared memory.
__device__ uint32_t shared_memory() {
    extern __shared__ uint8_t memory[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

__device__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

// A warpgroup's registers a thread, from the share of an equal division down or up.
template <int COUNT>
__device__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- mbarriers, by their address in shared memory

__device__ void init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Before the cluster_sync that lets others use what was initialised.
__device__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Until the phase of that parity is over.
__device__ void wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// Arrives, and makes the phase wait for bytes of copies.
__device__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier of that address in a block of the cluster.
__device__ void arrive(uint32_t barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// --- copies

// A box of y to an address in this block, or in every block of the cluster; its bytes arrive at a barrier beside it.
__device__ void load(const CUtensorMap* y, const Box& box, uint32_t to, uint32_t barrier) {
    if (box.both)
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
            "l"(y), "r"(box.column), "r"(box.row), "r"(box.slice), "r"(barrier), "h"(uint16_t{(1 << CLUSTER) - 1})
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
            "l"(y), "r"(box.column), "r"(box.row), "r"(box.slice), "r"(barrier)
            : "memory");
}

template <int BYTES>
__device__ void prefetch(const void* from) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "n"(BYTES) : "memory");
}

// --- wgmma

#define SUMS_8(i) \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
        "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)

// Before the first product of a group: registers that others wrote are seen.
__device__ void open_group() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// sums (+)= left' right over 16 rows.    left: [16, 64], right: [16, 192] fp16 in shared memory, sums: [64, 192].
__device__ void multiply(float (&sums)[SUMS], uint64_t left, uint64_t right, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "%96, %97, add, 1, 1, 1, 1;\n}"  // signs of the operands, then: both have their columns side by side
        : SUMS_32(0), SUMS_32(32), SUMS_32(64)
        : "l"(left), "l"(right), "r"(static_cast<int>(add)));
}

__device__ void close_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING groups run.
template <int PENDING>
__device__ void settle() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The sums, which wgmma writes behind the compiler's back, are not read before this point.
__device__ void pin(float (&sums)[SUMS]) { asm volatile("" : SUMS_32(0), SUMS_32(32), SUMS_32(64)::"memory"); }

#undef SUMS_32
#undef SUMS_8

}  // namespace
}  // namespace emocore::gram_cuda
