// The gram on Hopper: what a launch needs, and the index arithmetic that the kernel shares with tests on any CPU.
// Plain C++17; gram_cuda.cu is its only device code.
#pragma once
#include <cstdint>

namespace emocore::gram_cuda {

constexpr int TILE = 128;                 // edge of a tile of the state, rows of a macro tile
constexpr int WIDTH = 192;                // columns of a macro tile
constexpr int GROUP = 64;                 // columns of a box: 128 bytes of fp16, the width of the swizzle
constexpr int DEPTH = 64;                 // rows of y in a slab, the unit of a pipeline stage
constexpr int CHAIN = 512;                // rows that the tensor cores sum before a promotion, half with two parts
constexpr int LEFT = TILE / GROUP, RIGHT = WIDTH / GROUP, BOXES = LEFT + RIGHT;
constexpr int BOX_BYTES = DEPTH * GROUP * 2, STAGE_BYTES = BOXES * BOX_BYTES;
constexpr int STAGES = 5;
constexpr int MMA_DEPTH = 16;  // rows of y that one wgmma multiplies
constexpr int SUMS = GROUP * WIDTH / 128;  // of a thread: a warpgroup holds 64 x 192

// --- a launch: grid(...) blocks of THREADS in clusters of CLUSTER, SHARED_BYTES of dynamic shared memory

constexpr int CLUSTER = 2, THREADS = 384;
constexpr int SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + 2 * STAGES * 8;  // slack to align, stages, barriers
constexpr const char* ENTRIES[] = {"emocore_gram_sm90", "emocore_gram2_sm90"};  // by parts of y, less one

// What cuTensorMapEncodeTiled takes for y [hooks, parts, block, dim]: rank 3, fp16, 128-byte swizzle, no interleave,
// zeros out of bounds, L2 promotion as one likes.
struct Map {
    uint64_t sizes[3], strides[2];  // elements; bytes
    uint32_t box[3], steps[3];
};

constexpr Map map_of(uint64_t hooks, uint64_t parts, uint64_t block, uint64_t dim) {
    return {{dim, block, hooks * parts}, {2 * dim, 2 * dim * block}, {GROUP, DEPTH, 1}, {1, 1, 1}};
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int panels_of(int dim) { return ceil_div(dim, TILE); }

// --- work: a cluster takes two panels of 128 rows below each other, and one column of 192 for both

// The first panel of a macro column that holds a tile on or below the diagonal.
constexpr int first_panel(int column) { return column * WIDTH / TILE; }

// Items of one hook point.
constexpr int items_of(int dim) {
    int items = 0;
    for (int c = 0; first_panel(c) < panels_of(dim); ++c) items += ceil_div(panels_of(dim) - first_panel(c), CLUSTER);
    return items;
}

constexpr int grid(int hooks, int dim, int multiprocessors) {
    const int items = hooks * items_of(dim), clusters = multiprocessors / CLUSTER;
    return CLUSTER * (items < clusters ? items : clusters);
}

struct Work {
    int hook, panel, column;  // the panel of one block of the cluster; past the last where their number is odd
};

constexpr Work work_of(int item, int rank, int dim) {
    const int panels = panels_of(dim), items = items_of(dim);
    int left = item % items, column = 0;
    for (;; ++column) {
        const int pairs = ceil_div(panels - first_panel(column), CLUSTER);
        if (left < pairs) break;
        left -= pairs;
    }
    return {item / items, first_panel(column) + CLUSTER * left + rank, column};
}

// Whether 64 columns, the group-th of the matrix, belong to a lower tile of the panel.
constexpr bool is_lower(int panel, int group) { return group * GROUP / TILE <= panel; }

// Where the tile that holds a group begins in the state [hooks, T, 128, 128], at the group's first column.
constexpr int64_t state_offset(int hook, int panel, int group, int dim) {
    const int64_t panels = panels_of(dim), tile = static_cast<int64_t>(panel) * (panel + 1) / 2 + group * GROUP / TILE;
    return (hook * (panels * (panels + 1) / 2) + tile) * TILE * TILE + group * GROUP % TILE;
}

// --- summation: chains of slabs, and of a chain one sum of each kind, in one pass or two over its rows:
// high high' (kind 0, pass 0), and with two parts high low' + low high' (kind 1, passes 1 and 2).

constexpr int slabs_of(int block) { return ceil_div(block, DEPTH); }
constexpr int chain_slabs(int parts) { return CHAIN / parts / DEPTH; }
constexpr int passes_of(int kind) { return kind + 1; }
constexpr int all_passes(int parts) { return parts * (parts + 1) / 2; }
constexpr int left_part(int pass) { return pass == 2; }
constexpr int right_part(int pass) { return pass == 1; }
constexpr float worth(int kind) { return kind == 0 ? 1.0f : 1.0f / (1 << 11); }  // the low part is times 2^11

// --- shared memory: a stage is 2 boxes of the left operand, 3 of the right, [64 rows, 64 columns] each

struct Box {
    int column, row, slice;  // in the map
    int offset;              // bytes into the stage
    bool both;               // goes to both blocks of the cluster
};

// The right operand is the same for both blocks: they take turns at its boxes.
constexpr bool loads(int rank, int slab, int box) { return box < LEFT || (box + slab) % CLUSTER == rank; }

constexpr Box box_of(const Work& work, int parts, int pass, int slab, int box) {
    const bool right = box >= LEFT;
    const int column = right ? work.column * WIDTH + (box - LEFT) * GROUP : work.panel * TILE + box * GROUP;
    const int part = right ? right_part(pass) : left_part(pass);
    return {column, slab * DEPTH, work.hook * parts + part, box * BOX_BYTES, right};
}

// The matrix descriptor of wgmma for an operand whose columns lie side by side (MN-major; PTX: "Strides",
// "Matrix Descriptor Format"). A box is rows of 128 bytes; TMA puts 16-byte chunk c of row r at chunk c ^ (r % 8), and
// a box begins at a multiple of 1024 bytes, where that pattern repeats. wgmma walks atoms of 8 rows x 128 bytes under
// the same swizzle: down the rows by the stride offset (8 x 128 bytes), across groups of 64 columns by the leading
// offset (one box). 16 rows on is 2048 bytes on, again a multiple of 1024: the base offset stays 0.
constexpr uint64_t encode(uint64_t bytes) { return (bytes & 0x3ffff) >> 4; }
constexpr uint64_t descriptor(uint32_t address) {
    constexpr uint64_t SWIZZLE_128 = 1;
    return encode(address) | encode(BOX_BYTES) << 16 | encode(8 * 128) << 32 | SWIZZLE_128 << 62;
}

// Bytes into a stage at which an operand of the step-th wgmma of a slab begins.
constexpr int left_offset(int warpgroup, int step) { return warpgroup * BOX_BYTES + step * MMA_DEPTH * 128; }
constexpr int right_offset(int step) { return LEFT * BOX_BYTES + step * MMA_DEPTH * 128; }

// A ring of barriers: stage and parity of the round. A consumer waits for `parity`, a producer for the other: its first
// round finds every stage free.
template <int N>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    constexpr void advance() {
        stage = stage + 1 == N ? 0 : stage + 1;
        parity ^= stage == 0;
    }
    constexpr int previous() const { return stage == 0 ? N - 1 : stage - 1; }
};

// --- accumulators: sum s of a thread of the warpgroup, in its 64 x 192

constexpr int sum_row(int thread, int s) { return thread / 32 * 16 + thread % 32 / 4 + s / 2 % 2 * 8; }
constexpr int sum_column(int thread, int s) { return s / 4 * 8 + thread % 4 * 2 + s % 2; }

}  // namespace emocore::gram_cuda
