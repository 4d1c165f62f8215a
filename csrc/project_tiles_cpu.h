// Many rows against many readers: lines of readers side by side, a tile of scores in registers.
#pragma once

namespace emocore {
namespace {

// A tile is TILE_ROWS rows by two vectors of readers: 24 sums, 2 readers and a broadcast fill 27 of 32 registers.
constexpr int64_t TILE_ROWS = REGISTERS == 32 ? 12 : 6, TILE_LINES = 2;
constexpr int64_t SHORT_ROWS = TILE_ROWS / 3;  // of a tile for the last rows: still enough sums to hide their latency

constexpr int64_t LEVELS = 5;  // of the tree over at most 16 lanes

// The i-th of LANES lanes in the order in which pairs of them meet in total(): 0 and the middle one first.
template <int64_t L>
constexpr int64_t lane_in_turn(int64_t i) {
    int64_t lane = 0;
    for (int64_t bit = 1; bit < L; bit *= 2) lane = lane * 2 + (i / bit) % 2;
    return lane;
}

// Lines of LANES readers from reader k side by side, a line for each column of a chain: first the columns in lane 0
// of their vector, then those of the other lanes in turn; zero past K, and past D to a whole vector.
// lines: [depth to a whole vector, LANES].
template <class A, class R>
[[gnu::noinline]] void pack_readers(const Readers<A, R>& readers, int64_t k, int64_t d, int64_t depth, A* lines) {
    constexpr int64_t L = LANES<A>;
    const int64_t count = ceil_div(depth, L), known = least(L, readers.K - k);
    for (int64_t t = 0; t < count; ++t) {
        Vector<A> x[L] = {};
        for (int64_t i = 0; i < known; ++i) x[i] = readers.template columns<false>(k + i, d + t * L, depth - t * L);
        transpose(x);
        for (int64_t i = 0; i < L; ++i) store(lines + (i * count + t) * L, x[lane_in_turn<L>(i)]);
    }
}

// body(i, w) for every sum of a tile, unrolled whatever the compiler thinks of it: they are to stay in registers.
template <int64_t HEIGHT, int64_t WIDTH, class Body>
inline void each(const Body& body) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < HEIGHT; ++i)
#pragma GCC unroll 4
        for (int64_t w = 0; w < WIDTH; ++w) body(i, w);
}

// Rows that will be read next: asked for while others are multiplied.
struct Ahead {
    const char* data;
    int64_t stride, lines;  // bytes from row to row, cache lines of a row

    // The share of one lane in the lines of HEIGHT rows from row a.
    template <int64_t HEIGHT, int64_t L>
    void fetch(int64_t a, int64_t lane) const {
        for (int64_t line = lane; line < lines; line += L)
            for (int64_t i = 0; i < HEIGHT; ++i) __builtin_prefetch(data + (a + i) * stride + line * 64, 0, 2);
    }
};

// One chain of columns of some rows against some lines of readers.
template <class A>
struct Tiles {
    const A* y;      // [rows to a multiple of SHORT_ROWS, CHAIN], zeros past the chain to a whole vector
    const A* lines;  // `step` elements apart
    int64_t step;
    int64_t count;  // vectors of columns
    A* scores;      // [rows, stride]
    int64_t stride;
    bool add;
    Ahead ahead;

    static constexpr int64_t L = LANES<A>;

    // scores[a, k] (+)= y[a] . reader k, for every row and reader.
    void multiply(int64_t rows, int64_t lines_count) const {
        int64_t l = 0;
        for (; l + TILE_LINES <= lines_count; l += TILE_LINES) multiply_lines<TILE_LINES>(rows, l);
        for (; l < lines_count; ++l) multiply_lines<1>(rows, l);
    }

    template <int64_t WIDTH>
    void multiply_lines(int64_t rows, int64_t l) const {
        int64_t a = 0;
        for (; a + TILE_ROWS <= rows; a += TILE_ROWS) multiply_tile<TILE_ROWS, WIDTH>(a, l);
        for (; a < rows; a += SHORT_ROWS) multiply_tile<SHORT_ROWS, WIDTH>(a, l);
    }

    // HEIGHT rows from a on, WIDTH lines from l on: the sums of lane after lane meet as they do in total().
    template <int64_t HEIGHT, int64_t WIDTH>
    [[gnu::noinline]] void multiply_tile(int64_t a, int64_t l) const {
        Vector<A> waiting[LEVELS][HEIGHT][WIDTH];  // of 1, 2, 4, ... lanes, until there are as many others
        int64_t level = 0;
        for (int64_t lane = 0; lane < L; ++lane) {
            if (l == 0) ahead.fetch<HEIGHT, L>(a, lane);
            Vector<A> sum[HEIGHT][WIDTH];
            each<HEIGHT, WIDTH>([&](int64_t i, int64_t w) { sum[i][w] = Vector<A>{}; });
            const A* x = y + a * CHAIN + lane_in_turn<L>(lane);
            const A* line = lines + l * step + lane * count * L;
            for (int64_t t = 0; t < count; ++t) {
                Vector<A> v[WIDTH];
                for (int64_t w = 0; w < WIDTH; ++w) v[w] = load<A>(line + w * step + t * L);
                each<HEIGHT, WIDTH>([&](int64_t i, int64_t w) {
                    sum[i][w] = fma(broadcast(x[i * CHAIN + t * L]), v[w], sum[i][w]);
                });
            }
            for (level = 0; lane >> level & 1; ++level)
                each<HEIGHT, WIDTH>([&](int64_t i, int64_t w) { sum[i][w] = waiting[level][i][w] + sum[i][w]; });
            each<HEIGHT, WIDTH>([&](int64_t i, int64_t w) { waiting[level][i][w] = sum[i][w]; });
        }
        each<HEIGHT, WIDTH>([&](int64_t i, int64_t w) {
            put(scores + (a + i) * stride + (l + w) * L, waiting[level][i][w]);
        });
    }

    void put(A* score, Vector<A> sum) const {
        store(score, add ? load<A>(static_cast<const A*>(score)) + sum : sum);
    }
};

}  // namespace
}  // namespace emocore
