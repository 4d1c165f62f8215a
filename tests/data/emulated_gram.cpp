// For tests/test_gram_cuda.py: gram_cuda.cu on a CPU, compiled against emulated_ptx.h, one cluster after the other; and
// the index arithmetic of gram_cuda.h under plain names.
#include "gram_cuda.cu"

namespace gram = emocore::gram_cuda;

namespace {

struct Call {
    CUtensorMap y;
    const int32_t* exponent;
    const int64_t* cursor;
    double* tiles;
    int64_t size;  // of tiles
    int hooks, parts, block, dim, blocks;
};

struct Thread {
    const Call* call;
    gram::Cluster* cluster;
    int block, thread;
};

void* run(void* argument) {
    const Thread& self = *static_cast<Thread*>(argument);
    const Call& call = *self.call;
    gram::threadIdx.x = self.thread, gram::blockIdx.x = self.block, gram::gridDim.x = call.blocks;
    gram::cluster = self.cluster, gram::rank_ = self.block % gram::CLUSTER;
    gram::state = {call.tiles, call.tiles + call.size};
    const auto entry = call.parts == 1 ? gram::emocore_gram_sm90 : gram::emocore_gram2_sm90;
    entry(call.y, call.exponent, call.cursor, call.tiles, call.hooks, call.block, call.dim);
    return nullptr;
}

}  // namespace

extern "C" void emulate(const uint16_t* y, const int32_t* exponent, const int64_t* cursor, double* tiles, int64_t size,
                        int hooks, int parts, int block, int dim, int multiprocessors) {
    const CUtensorMap map{y, gram::map_of(hooks, parts, block, dim)};
    const int blocks = gram::grid(hooks, dim, multiprocessors);
    const Call call{map, exponent, cursor, tiles, size, hooks, parts, block, dim, blocks};
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 256 << 10);
    for (int first = 0; first < blocks; first += gram::CLUSTER) {
        gram::Cluster cluster;
        std::vector<Thread> threads;
        for (int i = 0; i < gram::CLUSTER * gram::THREADS; ++i)
            threads.push_back({&call, &cluster, first + i / gram::THREADS, i % gram::THREADS});
        std::vector<pthread_t> handles(threads.size());
        for (size_t i = 0; i < threads.size(); ++i)
            if (pthread_create(&handles[i], &small, run, &threads[i])) gram::fail("too many threads");
        for (pthread_t handle : handles) pthread_join(handle, nullptr);
    }
}

#define CONSTANT(name) extern "C" const int constant_##name = gram::name;
CONSTANT(WIDTH)
CONSTANT(DEPTH)
CONSTANT(CHAIN)
CONSTANT(RIGHT)
CONSTANT(BOXES)
CONSTANT(BOX_BYTES)
CONSTANT(STAGE_BYTES)
CONSTANT(SUMS)
CONSTANT(CLUSTER)
CONSTANT(THREADS)
CONSTANT(SHARED_BYTES)

#define FUNCTION(result, name, parameters, arguments) \
    extern "C" result function_##name parameters { return gram::name arguments; }
FUNCTION(gram::Map, map_of, (int s, int p, int n, int d), (s, p, n, d))
FUNCTION(int, grid, (int s, int d, int m), (s, d, m))
FUNCTION(int, items_of, (int d), (d))
FUNCTION(gram::Work, work_of, (int item, int rank, int d), (item, rank, d))
FUNCTION(bool, is_lower, (int panel, int group), (panel, group))
FUNCTION(int64_t, state_offset, (int hook, int panel, int group, int d), (hook, panel, group, d))
FUNCTION(int, slabs_of, (int n), (n))
FUNCTION(bool, loads, (int rank, int slab, int box), (rank, slab, box))
FUNCTION(gram::Box, box_of, (gram::Work w, int parts, int pass, int slab, int box), (w, parts, pass, slab, box))
FUNCTION(uint64_t, descriptor, (uint32_t address), (address))
FUNCTION(int, left_offset, (int warpgroup, int step), (warpgroup, step))
FUNCTION(int, right_offset, (int step), (step))
FUNCTION(int, sum_row, (int thread, int s), (thread, s))
FUNCTION(int, sum_column, (int thread, int s), (thread, s))

template <int N>
gram::Ring<N> after(int steps) {
    gram::Ring<N> ring;
    while (steps--) ring.advance();
    return ring;
}

extern "C" void ring(int stages, int steps, int* out) {
    const auto tell = [&](const auto& r) { out[0] = r.stage, out[1] = r.parity, out[2] = r.previous(); };
    stages == 3 ? tell(after<3>(steps)) : stages == 4 ? tell(after<4>(steps)) : tell(after<5>(steps));
}
