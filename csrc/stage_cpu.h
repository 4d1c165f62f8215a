// Selected rows copied side by side, measured and checked on the way.
#pragma once

namespace emocore {
namespace {

// out = x, returns sum x^2.    x, out: [D];  float64 accumulators, 4 per lane.
// `next` will be read after x: a gathered row lies where no prefetcher looks.
template <class T>
double copy_row(const T* x, const T* next, T* out, int64_t D) {
    constexpr int64_t L = LANES<double>, STEP = 4 * L;
    Vector<double> squares[4] = {};
    int64_t d = 0;
    for (; d + STEP <= D; d += STEP) {
        __builtin_prefetch(next + d, 0, 2);
        for (int64_t i = 0; i < 4; ++i) {
            const Vector<double> v = load<double>(x + d + i * L);
            squares[i] = fma(v, v, squares[i]);
        }
        std::memcpy(out + d, x + d, STEP * sizeof(T));
    }
    std::memcpy(out + d, x + d, (D - d) * sizeof(T));
    for (int64_t i = 0; d < D; d += L, ++i) {
        const Vector<double> v = d + L <= D ? load<double>(x + d) : load_some<double>(x + d, D - d);
        squares[i] = fma(v, v, squares[i]);
    }
    return total((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// x - x is 0 for a finite x, NaN otherwise.
template <class T>
bool every_finite(const T* x, int64_t D) {
    constexpr int64_t L = LANES<double>;
    Vector<double> zero{};
    for (int64_t d = 0; d < D; d += L) {
        const Vector<double> v = d + L <= D ? load<double>(x + d) : load_some<double>(x + d, D - d);
        zero = zero + (v - v);
    }
    return total(zero) == 0;
}

// out[j] = source[index[j]], norms[j] = |out[j]|, finite[j]; a row with a NaN or an infinity becomes zeros.
// source: [R, D], out: [n, D], norms: [n] float64, finite: [n].
template <class T>
void stage_rows(const Stage& job) {
    const int64_t n = job.out.rows, D = job.out.cols;
    const int64_t step = rows_per_part(D * sizeof(T));
    const auto picked = [&](int64_t j) { return row_of<const T>(job.source, job.index ? job.index[j] : j); };
    parallel(team(job.threads, n * D), ceil_div(n, step), [&](int, int64_t part) {
        for (int64_t j = part * step; j < least(n, (part + 1) * step); ++j) {
            const T* x = picked(j);
            T* out = row_of<T>(job.out, j);
            const T* next = job.index && j + 1 < n ? picked(j + 1) : x;
            const double squared = copy_row(x, next, out, D);
            // Squares of 16- and 32-bit rows cannot overflow a float64, so a finite sum proves the row
            // finite; only large float64 rows need the second look.
            const bool finite = std::isfinite(squared) || every_finite(x, D);
            job.finite[j] = finite;
            job.norms[j] = finite ? std::sqrt(squared) : 0;
            if (!finite) std::memset(out, 0, D * sizeof(T));
        }
    });
}

void stage(const Stage& job) {
    with_element(job.out.dtype, [&](auto element) { stage_rows<decltype(element)>(job); });
}

}  // namespace
}  // namespace emocore
