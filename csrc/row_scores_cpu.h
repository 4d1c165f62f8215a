// Scores of a few rows where they lie, for what edits them next.
#pragma once

namespace emocore {
namespace {

// Rows that share one read of what is done to them, and directions that share one read of the rows: 24 sums, 3
// directions and a row fill 28 of 32 registers.
constexpr int64_t EDIT_ROWS = REGISTERS == 32 ? 8 : 4, EDIT_DIRECTIONS = REGISTERS == 32 ? 3 : 2;

// body(std::integral_constant of count), 1 <= count <= 4.
template <class Body>
void with_few(int64_t count, const Body& body) {
    if (count == 1) return body(std::integral_constant<int64_t, 1>{});
    if (count == 2) return body(std::integral_constant<int64_t, 2>{});
    if (count == 3) return body(std::integral_constant<int64_t, 3>{});
    body(std::integral_constant<int64_t, 4>{});
}

// scores[a, b] += x[a] . v[b] over columns [first, last), a < ROWS, b < WIDTH.
// v: [WIDTH, v_stride], scores: [ROWS, stride] in A;  `ahead` elements on are the rows that come next.
template <class A, class T, int64_t ROWS, int64_t WIDTH>
void add_scores(const T* const* x, int64_t ahead, const A* v, int64_t v_stride, int64_t first, int64_t last,
                A* scores, int64_t stride) {
    constexpr int64_t L = LANES<A>;
    Vector<A> sum[ROWS][WIDTH] = {};
    int64_t d = first;
    for (; d + L <= last; d += L) {
        Vector<A> y[WIDTH];
        for (int64_t b = 0; b < WIDTH; ++b) y[b] = load<A>(v + b * v_stride + d);
        for (int64_t a = 0; a < ROWS; ++a) {
            if (ahead) __builtin_prefetch(x[a] + d + ahead);
            const Vector<A> row = load<A>(x[a] + d);
            for (int64_t b = 0; b < WIDTH; ++b) sum[a][b] = fma(row, y[b], sum[a][b]);
        }
    }
    for (int64_t b = 0; d < last && b < WIDTH; ++b) {
        const Vector<A> y = load_some<A>(v + b * v_stride + d, last - d);
        for (int64_t a = 0; a < ROWS; ++a) sum[a][b] = fma(load_some<A>(x[a] + d, last - d), y, sum[a][b]);
    }
    for (int64_t a = 0; a < ROWS; ++a)
        for (int64_t b = 0; b < WIDTH; ++b) scores[a * stride + b] += total(sum[a][b]);
}

// scores[a, k] = x[a] . v[k].    x: ROWS rows of [D], v: [K, D] in A, scores: [ROWS, K];  LANES partial sums in A
// along chains of CHAIN columns, then the chains: in the same order whatever stands beside.
template <class A, class T, int64_t ROWS>
void score_some(const T* const* x, int64_t ahead, const Rows& v, A* scores) {
    const int64_t D = v.cols, K = v.rows;
    for (int64_t i = 0; i < ROWS * K; ++i) scores[i] = 0;
    for (int64_t first = 0; first < D; first += CHAIN) {
        for (int64_t k = 0; k < K; k += EDIT_DIRECTIONS) {
            with_few(least(EDIT_DIRECTIONS, K - k), [&](auto width) {
                add_scores<A, T, ROWS, width>(x, k == 0 ? ahead : 0, row_of<const A>(v, k), v.stride, first,
                                              least(D, first + CHAIN), scores + k, K);
            });
        }
    }
}

template <class A, class T>
void score_rows(const T* const* x, int64_t count, int64_t ahead, const Rows& v, A* scores) {
    if (count == EDIT_ROWS) return score_some<A, T, EDIT_ROWS>(x, ahead, v, scores);
    for (int64_t a = 0; a < count; ++a) score_some<A, T, 1>(x + a, ahead, v, scores + a * v.rows);
}

}  // namespace
}  // namespace emocore
