// The packed product under gram and project: PANEL columns side by side, one cache line a step.
#pragma once

namespace emocore {
namespace {

template <class A>
constexpr int64_t PANEL = 64 / sizeof(A);

// Rows of the register block: 6 x 2 sums, 2 columns and a broadcast fill AVX2's 16 registers.
constexpr int64_t REGISTER_ROWS = 6;

// block[a, b] (+)= sum_k left[a, k] right[k, b] for a < ROWS, b < PANEL: one chain in A.
// left: element (a, k) at a * ROW + k * STEP;  right: [depth, PANEL];  block: [ROWS, PANEL].
template <class A, int64_t ROWS, int64_t ROW, int64_t STEP>
void multiply_block(const A* left, const A* right, int64_t depth, A* block, bool add) {
    constexpr int64_t L = LANES<A>;
    for (int64_t b = 0; b < PANEL<A>; b += 2 * L) {
        Vector<A> sum[ROWS][2] = {};
        for (int64_t k = 0; k < depth; ++k) {
            const Vector<A> right0 = load<A>(right + k * PANEL<A> + b);
            const Vector<A> right1 = load<A>(right + k * PANEL<A> + b + L);
#pragma GCC unroll 8
            for (int64_t a = 0; a < ROWS; ++a) {
                const Vector<A> x = broadcast(left[a * ROW + k * STEP]);
                sum[a][0] = fma(x, right0, sum[a][0]);
                sum[a][1] = fma(x, right1, sum[a][1]);
            }
        }
        for (int64_t a = 0; a < ROWS; ++a) {
            for (int64_t i = 0; i < 2; ++i) {
                A* out = block + a * PANEL<A> + b + i * L;
                store(out, add ? load<A>(static_cast<const A*>(out)) + sum[a][i] : sum[a][i]);
            }
        }
    }
}

// The same for any number of rows: as few register blocks as hold them, of even height.
template <class A, int64_t ROW, int64_t STEP>
void multiply(const A* left, int64_t rows, const A* right, int64_t depth, A* block, bool add) {
    for (int64_t pieces = ceil_div(rows, REGISTER_ROWS); pieces > 0; --pieces) {
        const int64_t height = ceil_div(rows, pieces);
        switch (height) {
            case 1: multiply_block<A, 1, ROW, STEP>(left, right, depth, block, add); break;
            case 2: multiply_block<A, 2, ROW, STEP>(left, right, depth, block, add); break;
            case 3: multiply_block<A, 3, ROW, STEP>(left, right, depth, block, add); break;
            case 4: multiply_block<A, 4, ROW, STEP>(left, right, depth, block, add); break;
            case 5: multiply_block<A, 5, ROW, STEP>(left, right, depth, block, add); break;
            default: multiply_block<A, 6, ROW, STEP>(left, right, depth, block, add);
        }
        rows -= height;
        left += height * ROW;
        block += height * PANEL<A>;
    }
}

}  // namespace
}  // namespace emocore
