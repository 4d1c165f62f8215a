// fold_gram (docs/gpu.md) for sm_90a: TMA feeds wgmma, chains of 512 rows are promoted in registers.
// Compiled and emulated, never yet timed: Triton's kernel serves until a measurement on the device prefers this one.
//
//   emocore_gram_sm90   y of one fp16 part       emocore_gram2_sm90   two parts, high + low 2^-11
//     y         CUtensorMap, __grid_constant__: [hooks, parts, block, dim] fp16 by `map_of`; dim % 8 == 0
//     exponent  int32 [hooks, dim], 16-byte aligned; |k_i + k_j| <= 1022
//     cursor    int64 [2]; nothing happens while cursor[0] - cursor[1] < block
//     tiles     float64 [hooks, T, 128, 128], 16-byte aligned
//     hooks, block, dim  int32
//   Grid `grid(hooks, dim, multiprocessors)`, or any even number; blocks of THREADS; SHARED_BYTES of dynamic shared
//   memory. The cluster, CLUSTER x 1 x 1, is compiled in: a launch need not name it, but may name no other.
//
// A cluster of two blocks walks over macro tiles of 128 x 192, one panel of rows each, the columns multicast to both.
// One warp loads, two warpgroups multiply, each 64 x 192: 96 sums of the running chain and 96 of the block a thread.
#include "gram_cuda.h"
#include "gram_ptx.h"

namespace emocore::gram_cuda {
namespace {

constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(128 * PRODUCER_REGISTERS + 256 * CONSUMER_REGISTERS <= 65536);
constexpr int CONSUMER_WARPS = 8;

// The state is prefetched to L2 over the last slabs of an item, 64 columns of a row at a time.
constexpr int PIECES = TILE * RIGHT, PIECES_PER_SLAB = 16, PREFETCH_SLABS = PIECES / PIECES_PER_SLAB;

struct Job {
    const CUtensorMap* y;
    const int32_t* exponent;
    double* tiles;
    int hooks, block, dim;
};

// Shared memory of a block: stages from a multiple of 1024 bytes on, then the barriers.
struct Shared {
    uint32_t base;
    __device__ uint32_t stage(int i) const { return base + i * STAGE_BYTES; }
    __device__ uint32_t full(int i) const { return base + STAGES * STAGE_BYTES + i * 8; }
    __device__ uint32_t empty(int i) const { return full(STAGES + i); }
};

// --- the producer

__device__ void prefetch_state(const Job& job, const Work& work, int piece) {
    const int group = work.column * RIGHT + piece / TILE;
    if (work.panel >= panels_of(job.dim) || !is_lower(work.panel, group)) return;
    prefetch<GROUP * 8>(job.tiles + state_offset(work.hook, work.panel, group, job.dim) + piece % TILE * TILE);
}

// One warp: its first lane loads, half of them prefetch.
template <int PARTS>
__device__ void produce(const Job& job, Shared shared, int rank) {
    const int slabs = slabs_of(job.block), lane = threadIdx.x % 32, items = job.hooks * items_of(job.dim);
    Ring<STAGES> ring;
    for (int item = blockIdx.x / CLUSTER; item < items; item += gridDim.x / CLUSTER) {
        const Work work = work_of(item, rank, job.dim);
        int piece = lane - PIECES_PER_SLAB * (slabs * all_passes(PARTS) - PREFETCH_SLABS);
        for (int first = 0; first < slabs; first += chain_slabs(PARTS))
            for (int pass = 0; pass < all_passes(PARTS); ++pass)
                for (int slab = first; slab < min(first + chain_slabs(PARTS), slabs); ++slab) {
                    wait(shared.empty(ring.stage), ring.parity ^ 1);
                    if (lane == 0) {
                        expect(shared.full(ring.stage), STAGE_BYTES);
                        for (int b = 0; b < BOXES; ++b) {
                            const Box box = box_of(work, PARTS, pass, slab, b);
                            if (loads(rank, slab, b))
                                load(job.y, box, shared.stage(ring.stage) + box.offset, shared.full(ring.stage));
                        }
                    }
                    __syncwarp();
                    if (lane < PIECES_PER_SLAB && piece >= 0) prefetch_state(job, work, piece);
                    piece += PIECES_PER_SLAB;
                    ring.advance();
                }
    }
}

// --- the consumers

__device__ void release(Shared shared, int stage) {
    const int lane = threadIdx.x % 32;
    if (lane < CLUSTER) arrive(shared.empty(stage), lane);
}

// state += total 2^(k_i + k_j) where the warpgroup's 64 x 192 lies in lower tiles.
// A tile is whole in memory, and past dim its sums are 0, as TMA filled y with zeros: only the exponents end at dim.
__device__ void fold(const float (&total)[SUMS], const Job& job, const Work& work, int warpgroup) {
    const int thread = threadIdx.x % 128, row = warpgroup * GROUP + sum_row(thread, 0);  // and row + 8
    const int32_t* exponent = job.exponent + static_cast<int64_t>(work.hook) * job.dim;
    const int upper = exponent[min(work.panel * TILE + row, job.dim - 1)];
    const int lower = exponent[min(work.panel * TILE + row + 8, job.dim - 1)];
    const auto power = [](int k) { return __hiloint2double((1023 + k) << 20, 0); };
#pragma unroll
    for (int g = 0; g < RIGHT; ++g) {
        const int group = work.column * RIGHT + g, column = group * GROUP + sum_column(thread, 0);
        if (work.panel >= panels_of(job.dim) || !is_lower(work.panel, group)) break;
        double* state = job.tiles + state_offset(work.hook, work.panel, group, job.dim);
        double2* at = reinterpret_cast<double2*>(state + row * TILE + sum_column(thread, 0));
        double2 before[2][8];
        int2 k[8];
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            k[n] = *reinterpret_cast<const int2*>(exponent + min(column + 8 * n, job.dim - 2));
            before[0][n] = at[n * 8 / 2];
            before[1][n] = at[(8 * TILE + n * 8) / 2];
        }
        asm volatile("" ::: "memory");  // all loads are in flight before the first store
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* sum = total + 32 * g + 4 * n + 2 * half;
                const int own = half ? lower : upper;
                double2 after = before[half][n];
                after.x = __fma_rn(static_cast<double>(sum[0]), power(own + k[n].x), after.x);
                after.y = __fma_rn(static_cast<double>(sum[1]), power(own + k[n].y), after.y);
                at[(half * 8 * TILE + n * 8) / 2] = after;
            }
        }
    }
}

template <int PARTS>
__device__ void consume(const Job& job, Shared shared, int rank, int warpgroup) {
    const int slabs = slabs_of(job.block), items = job.hooks * items_of(job.dim);
    Ring<STAGES> ring;
    for (int item = blockIdx.x / CLUSTER; item < items; item += gridDim.x / CLUSTER) {
        float total[SUMS] = {}, sums[SUMS] = {};  // of sums only to say that they die with the item
        for (int first = 0; first < slabs; first += chain_slabs(PARTS))
            for (int kind = 0; kind < PARTS; ++kind) {
                const int count = passes_of(kind) * min(chain_slabs(PARTS), slabs - first);
                for (int slab = 0; slab < count; ++slab) {
                    wait(shared.full(ring.stage), ring.parity);
                    const uint32_t stage = shared.stage(ring.stage);
                    open_group();
#pragma unroll
                    for (int step = 0; step < DEPTH / MMA_DEPTH; ++step)
                        multiply(sums, descriptor(stage + left_offset(warpgroup, step)),
                                 descriptor(stage + right_offset(step)), slab > 0 || step > 0);
                    close_group();
                    settle<1>();  // the slab before this one has been read
                    if (slab > 0) release(shared, ring.previous());
                    ring.advance();
                }
                settle<0>();
                pin(sums);
                release(shared, ring.previous());
#pragma unroll
                for (int s = 0; s < SUMS; ++s)
                    total[s] = PARTS == 1 ? __fadd_rn(total[s], sums[s]) : __fmaf_rn(sums[s], worth(kind), total[s]);
            }
        fold(total, job, work_of(item, rank, job.dim), warpgroup);
    }
}

template <int PARTS>
__device__ void run(const Job& job, const int64_t* cursor) {
    if (cursor[0] - cursor[1] < job.block) return;
    const Shared shared{(shared_memory() + 1023) / 1024 * 1024};
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), rank = cluster_rank();  // uniform, and known to be
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) init(shared.full(i), 1);
        for (int i = 0; i < STAGES; ++i) init(shared.empty(i), CLUSTER * CONSUMER_WARPS);
        publish_barriers();
    }
    cluster_sync();
    if (warp < 4) {
        give_registers<PRODUCER_REGISTERS>();
        if (warp == 0) produce<PARTS>(job, shared, rank);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume<PARTS>(job, shared, rank, warp / 4 - 1);
    }
    cluster_sync();  // no block leaves while the other may still write to it
}

}  // namespace

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    emocore_gram_sm90(const __grid_constant__ CUtensorMap y, const int32_t* exponent, const int64_t* cursor,
                      double* tiles, int hooks, int block, int dim) {
    run<1>({&y, exponent, tiles, hooks, block, dim}, cursor);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    emocore_gram2_sm90(const __grid_constant__ CUtensorMap y, const int32_t* exponent, const int64_t* cursor,
                       double* tiles, int hooks, int block, int dim) {
    run<2>({&y, exponent, tiles, hooks, block, dim}, cursor);
}

}  // namespace emocore::gram_cuda
