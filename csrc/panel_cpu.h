// The packed product under gram: a panel holds a few columns side by side, one cache line a row.
#pragma once

namespace emocore {
namespace {

// What gram asks of a product, beside pack and multiply as below, and fold_more where there is more:
//   Sum, ELEMENT   the type of its sums, the bytes of an element that it reads
//   PANEL          columns of a panel, a divisor of TILE
//   CHAIN_ROWS     rows that one register sums
//   PACK_ROWS      rows that are packed at a time, a divisor of them
//   PANEL_BYTES    of a packed panel of one chain
//   FAR_CHAINS     packed together where one chain alone does not stay near: the sums of a block, which do not
//                  either, are then fetched once for all of them
//   more()         panels past those of the columns
//   TURN_TILES     rows of tiles whose strips take turns with one column of tiles: their packed columns should
//                  stay in the second-level cache while the others pass by
// A and T are the types that rows are multiplied in and come in.
template <class A, class T>
struct LineProduct {
    using Sum = A;
    static constexpr int64_t ELEMENT = sizeof(T), PANEL = 64 / sizeof(A), CHAIN_ROWS = CHAIN, PACK_ROWS = 16;
    static constexpr int64_t PANEL_BYTES = CHAIN_ROWS * PANEL * sizeof(A), FAR_CHAINS = 4, TURN_TILES = 4;

    static constexpr int64_t more() { return 0; }
    static void fold_more(const A*, int64_t, int64_t) {}

    // Bytes of a row that are asked for before they are packed.
    static constexpr int64_t AHEAD = 1024;

    // packed[panel, first + r] = (x[r] - shift) sqrt(w[r]), zero past D.
    // x: [count, D], w: [count] or null, shift: [panels, PANEL], packed: [panels, CHAIN_ROWS, PANEL].
    static void pack(const Rows& x, const double* w, const A* shift, int64_t first, int64_t panels,
                     void* packed) {
        A root[PACK_ROWS];
        for (int64_t r = 0; r < x.rows; ++r) root[r] = static_cast<A>(w ? std::sqrt(w[r]) : 1.0);
        A* lines = static_cast<A*>(packed) + first * PANEL;
        // Few rows at a time through every panel, a few lines of each: reads are streams, writes are whole lines.
        constexpr int64_t LINES = 8;
        for (int64_t first_panel = 0; first_panel < panels; first_panel += LINES) {
            for (int64_t r = 0; r < x.rows; ++r) {
                const T* row = row_of<const T>(x, r);
                for (int64_t p = first_panel; p < least(first_panel + LINES, panels); ++p) {
                    __builtin_prefetch(reinterpret_cast<const char*>(row + p * PANEL) + AHEAD, 0, 2);
                    pack_line(row, p * PANEL, x.cols, shift, root[r], lines + (p * CHAIN_ROWS + r) * PANEL);
                }
            }
        }
    }

    static void pack_line(const T* x, int64_t first, int64_t D, const A* shift, A root, A* line) {
        constexpr int64_t L = LANES<A>;
        for (int64_t i = 0, d = first; i < PANEL; i += L, d += L) {
            const Vector<A> v = d + L <= D ? load<A>(x + d) : load_some<A>(x + d, most(0, D - d));
            store(line + i, (v - load<A>(shift + d)) * broadcast(root));
        }
    }

    // blocks[b] (+)= left' right[b].
    // left: [rows, PANEL], right: [count, CHAIN_ROWS, PANEL], blocks: [count, PANEL, PANEL].
    static void multiply(const void* left, const void* right, int64_t count, int64_t rows, A* blocks,
                         bool add) {
        const A* x = static_cast<const A*>(left);
        const A* y = static_cast<const A*>(right);
        if constexpr (REGISTERS < 32) {
            // Two vectors of columns: with 6 rows, 12 sums, 2 columns and a broadcast fill 16 registers.
            constexpr int64_t L = LANES<A>;
            for (int64_t b = 0; b < count; ++b)
                for (int64_t c = 0; c < PANEL; c += 2 * L)
                    multiply_columns<2>(x, y + b * CHAIN_ROWS * PANEL + c, L, rows,
                                        blocks + b * PANEL * PANEL + c, L, add);
        } else {
            // Three panels of one vector: with 8 rows, 24 sums, 3 columns and a broadcast fill 28.
            static_assert(LANES<A> == PANEL);
            const auto some = [&](auto width, int64_t b) {
                multiply_columns<width>(x, y + b * CHAIN_ROWS * PANEL, CHAIN_ROWS * PANEL, rows,
                                        blocks + b * PANEL * PANEL, PANEL * PANEL, add);
            };
            int64_t b = 0;
            for (; b + 3 <= count; b += 3) some(std::integral_constant<int64_t, 3>{}, b);
            if (count - b == 2) some(std::integral_constant<int64_t, 2>{}, b);
            if (count - b == 1) some(std::integral_constant<int64_t, 1>{}, b);
        }
    }

    // Every row of a block, WIDTH vectors of its columns.
    template <int64_t WIDTH>
    static void multiply_columns(const A* left, const A* right, int64_t right_step, int64_t rows, A* block,
                                 int64_t block_step, bool add) {
        const auto strip = [&](auto height, int64_t a) {
            multiply_strip<height, WIDTH>(left + a, right, right_step, rows, block + a * PANEL, block_step,
                                          add);
        };
        if constexpr (REGISTERS == 32) {
            for (int64_t a = 0; a < PANEL; a += 8) strip(std::integral_constant<int64_t, 8>{}, a);
        } else if constexpr (PANEL == 16) {
            strip(std::integral_constant<int64_t, 6>{}, 0);
            strip(std::integral_constant<int64_t, 5>{}, 6);
            strip(std::integral_constant<int64_t, 5>{}, 11);
        } else {
            static_assert(PANEL == 8);
            strip(std::integral_constant<int64_t, 4>{}, 0);
            strip(std::integral_constant<int64_t, 4>{}, 4);
        }
    }

    // block[a, i] (+)= sum_r left[r, a] right[r, i], a < HEIGHT, WIDTH vectors i a step apart: one chain in A.
    template <int64_t HEIGHT, int64_t WIDTH>
    static void multiply_strip(const A* left, const A* right, int64_t right_step, int64_t rows, A* block,
                               int64_t block_step, bool add) {
        // Lines that are asked for ahead: the panels of one strip do not fit in the first-level cache.
        constexpr int64_t LINES = 16;
        Vector<A> sum[HEIGHT][WIDTH] = {};
        // The block may lie far: asked for now, it is here when the sums are.
        for (int64_t a = 0; REGISTERS == 32 && add && a < HEIGHT; ++a)
            for (int64_t i = 0; i < WIDTH; ++i) __builtin_prefetch(block + a * PANEL + i * block_step, 1);
        for (int64_t r = 0; r < rows; ++r) {
            Vector<A> y[WIDTH];
            for (int64_t i = 0; i < WIDTH; ++i) {
                const A* line = right + r * PANEL + i * right_step;
                if constexpr (REGISTERS == 32) __builtin_prefetch(line + LINES * PANEL);
                y[i] = load<A>(line);
            }
            if constexpr (REGISTERS == 32) __builtin_prefetch(left + (r + LINES) * PANEL);
            for (int64_t a = 0; a < HEIGHT; ++a) {
                const Vector<A> x = broadcast(left[r * PANEL + a]);
                for (int64_t i = 0; i < WIDTH; ++i) sum[a][i] = fma(x, y[i], sum[a][i]);
            }
        }
        for (int64_t a = 0; a < HEIGHT; ++a) {
            for (int64_t i = 0; i < WIDTH; ++i) {
                A* out = block + a * PANEL + i * block_step;
                store(out, add ? load<A>(static_cast<const A*>(out)) + sum[a][i] : sum[a][i]);
            }
        }
    }
};

}  // namespace
}  // namespace emocore
