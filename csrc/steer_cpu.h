// One vector added to every row.
#pragma once

namespace emocore {
namespace {

// out = x + delta, one rounding.    x, out: [D], delta: [D] in A;  `ahead` elements on is the next row.
template <class A, class T>
void add_to_row(const T* x, int64_t ahead, const A* delta, int64_t D, T* out) {
    constexpr int64_t L = LANES<A>;
    int64_t d = 0;
    for (; d + L <= D; d += L) {
        __builtin_prefetch(x + d + ahead);
        store(out + d, load<A>(x + d) + load<A>(delta + d));
    }
    if (d < D) store_some<A>(out + d, D - d, load_some<A>(x + d, D - d) + load_some<A>(delta + d, D - d));
}

// out = x + delta, rounded once to the type of the rows.
// rows, out: [N, D], delta: [D];  the sum in float32, in float64 for float64 rows.
template <class A, class T>
void add_delta(const SteerAdd& job) {
    const int64_t N = job.rows.rows, D = job.rows.cols, step = rows_per_part(D * sizeof(T));
    const Scratch delta_memory(D * sizeof(A));
    A* delta = array<A>(delta_memory);
    for (int64_t d = 0; d < D; ++d)
        delta[d] = static_cast<A>(job.delta.dtype == DType::float64 ? row_of<const double>(job.delta, 0)[d]
                                                                    : row_of<const float>(job.delta, 0)[d]);
    parallel(team(job.threads, N * D), ceil_div(N, step), [&](int, int64_t part) {
        for (int64_t r = part * step; r < least(N, (part + 1) * step); ++r)
            add_to_row<A, T>(row_of<const T>(job.rows, r), job.rows.stride, delta, D, row_of<T>(job.out, r));
    });
}

void steer_add(const SteerAdd& job) {
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        add_delta<std::conditional_t<std::is_same_v<T, double>, double, float>, T>(job);
    });
}

}  // namespace
}  // namespace emocore
