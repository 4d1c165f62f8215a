// The packed product under gram: PANEL columns side by side, one cache line a row.
#pragma once

namespace emocore {
namespace {

template <class A>
constexpr int64_t PANEL = 64 / sizeof(A);

// block[a, b] (+)= sum_r left[r, a] right[r, b] for a < HEIGHT, b < PANEL: one chain in A.
// left, right: [depth, PANEL], block: [HEIGHT, PANEL].
template <class A, int64_t HEIGHT>
void multiply_strip(const A* left, const A* right, int64_t depth, A* block, bool add) {
    constexpr int64_t L = LANES<A>, P = PANEL<A>;
    for (int64_t b = 0; b < P; b += 2 * L) {
        Vector<A> sum[HEIGHT][2] = {};
        for (int64_t r = 0; r < depth; ++r) {
            const Vector<A> right0 = load<A>(right + r * P + b), right1 = load<A>(right + r * P + b + L);
            for (int64_t a = 0; a < HEIGHT; ++a) {
                const Vector<A> x = broadcast(left[r * P + a]);
                sum[a][0] = fma(x, right0, sum[a][0]);
                sum[a][1] = fma(x, right1, sum[a][1]);
            }
        }
        for (int64_t a = 0; a < HEIGHT; ++a) {
            for (int64_t i = 0; i < 2; ++i) {
                A* out = block + a * P + b + i * L;
                store(out, add ? load<A>(static_cast<const A*>(out)) + sum[a][i] : sum[a][i]);
            }
        }
    }
}

// block (+)= left' right.    left, right: [depth, PANEL], block: [PANEL, PANEL].
// In strips of at most 6 rows: 6 x 2 sums, 2 columns and a broadcast fill AVX2's 16 registers.
template <class A>
void multiply(const A* left, const A* right, int64_t depth, A* block, bool add) {
    constexpr int64_t P = PANEL<A>;
    const auto strip = [&](auto height, int64_t a) {
        multiply_strip<A, height>(left + a, right, depth, block + a * P, add);
    };
    if constexpr (P == 16) {
        strip(std::integral_constant<int64_t, 6>{}, 0);
        strip(std::integral_constant<int64_t, 5>{}, 6);
        strip(std::integral_constant<int64_t, 5>{}, 11);
    } else {
        static_assert(P == 8);
        strip(std::integral_constant<int64_t, 4>{}, 0);
        strip(std::integral_constant<int64_t, 4>{}, 4);
    }
}

}  // namespace
}  // namespace emocore
