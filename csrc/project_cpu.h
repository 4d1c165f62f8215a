#pragma once

namespace emocore {
namespace {

// Rows that share one read of the readers.
constexpr int64_t PROJECT_ROWS = 48;

// y = x - centre over one chain of columns, then zeros to a whole vector; returns sum y^2.
// x, centre: [depth], y: [CHAIN] in A;  float64 accumulators.
template <class A, class T>
double centre_row(const T* x, const A* centre, int64_t depth, A* y) {
    constexpr int64_t L = LANES<A>, W = LANES<double>;
    int64_t d = 0;
    for (; d + L <= depth; d += L) store(y + d, load<A>(x + d) - load<A>(centre + d));
    if (d < depth) store(y + d, load_some<A>(x + d, depth - d) - load_some<A>(centre + d, depth - d));
    const A* values = y;
    Vector<double> even{}, odd{};
    for (d = 0; d < depth; d += 2 * W) {
        const Vector<double> a = load<double>(values + d);
        even = fma(a, a, even);
        if (d + W >= depth) break;
        const Vector<double> b = load<double>(values + d + W);
        odd = fma(b, b, odd);
    }
    return total(even + odd);
}

// scores[a, k] (+)= y_a . v_k over one chain of columns, for a < ROWS, k < READERS: LANES partial sums in A.
// y: [ROWS, CHAIN], zero past depth;  readers: [READERS, depth];  scores: [ROWS, stride].
template <class A, class R, int64_t ROWS, int64_t READERS>
void dot_block(const A* y, const R* readers, int64_t reader_stride, int64_t depth, A* scores, int64_t stride, bool add) {
    constexpr int64_t L = LANES<A>;
    Vector<A> sum[ROWS][READERS] = {};
    int64_t d = 0;
    for (; d + L <= depth; d += L) {
        for (int64_t k = 0; k < READERS; ++k) {
            const Vector<A> v = load<A>(readers + k * reader_stride + d);
            for (int64_t a = 0; a < ROWS; ++a) sum[a][k] = fma(load<A>(y + a * CHAIN + d), v, sum[a][k]);
        }
    }
    for (int64_t k = 0; d < depth && k < READERS; ++k) {
        const Vector<A> v = load_some<A>(readers + k * reader_stride + d, depth - d);
        for (int64_t a = 0; a < ROWS; ++a) sum[a][k] = fma(load<A>(y + a * CHAIN + d), v, sum[a][k]);
    }
    for (int64_t a = 0; a < ROWS; ++a) {
        for (int64_t k = 0; k < READERS; ++k) {
            A& score = scores[a * stride + k];
            score = add ? score + total(sum[a][k]) : total(sum[a][k]);
        }
    }
}

template <class A, class R, int64_t READERS>
void dot_rows(const A* y, int64_t count, const R* readers, int64_t reader_stride, int64_t depth, A* scores,
              int64_t stride, bool add) {
    int64_t a = 0;
    for (; a + 3 <= count; a += 3)
        dot_block<A, R, 3, READERS>(y + a * CHAIN, readers, reader_stride, depth, scores + a * stride, stride, add);
    for (; a < count; ++a)
        dot_block<A, R, 1, READERS>(y + a * CHAIN, readers, reader_stride, depth, scores + a * stride, stride, add);
}

// scores / norm, one rounding.
template <class A, class O>
void write_scores(const A* scores, int64_t count, double norm, O* out) {
    for (int64_t k = 0; k < count; ++k)
        out[k] = static_cast<O>(norm > 0 ? static_cast<double>(scores[k]) / norm : static_cast<double>(scores[k]));
}

// out[r, k] = (x_r - c) . v_k, over |x_r - c| when normalise.
// rows: [N, D], readers: [K, D], centre: [D], out: [N, K];  LANES partial sums in A along a chain of CHAIN columns,
// chains in A. Every score is summed in the same order whatever rows and readers stand beside it.
template <class A, class T, class R>
void project_rows(const Project& job) {
    const int64_t N = job.rows.rows, D = job.rows.cols, K = job.readers.rows;
    const int threads = team(job.threads, N * D * ceil_div(K, 8));
    // Few rows: the readers are shared out instead.
    const int64_t height = least(PROJECT_ROWS, ceil_div(N, threads)), bands = ceil_div(N, height);
    const int64_t width = ceil_div(ceil_div(K, ceil_div(threads, bands)), 4) * 4, groups = ceil_div(K, width);

    const Scratch centre_memory(D * sizeof(A)), row_memory(threads * PROJECT_ROWS * CHAIN * sizeof(A));
    const Scratch score_memory(threads * PROJECT_ROWS * width * sizeof(A));
    A* centre = array<A>(centre_memory);
    for (int64_t d = 0; d < D; ++d) centre[d] = job.centre ? static_cast<A>(job.centre[d]) : 0;

    parallel(threads, bands * groups, [&](int member, int64_t part) {
        const int64_t first = part / groups * height, count = least(height, N - first);
        const int64_t k0 = part % groups * width, readers = least(width, K - k0);
        A* y = array<A>(row_memory) + member * PROJECT_ROWS * CHAIN;
        A* scores = array<A>(score_memory) + member * PROJECT_ROWS * width;
        double squares[PROJECT_ROWS] = {};
        for (int64_t start = 0; start < D; start += CHAIN) {
            const int64_t depth = least(CHAIN, D - start);
            for (int64_t a = 0; a < count; ++a) {
                const T* x = row_of<const T>(job.rows, first + a) + start;
                squares[a] += centre_row(x, centre + start, depth, y + a * CHAIN);
            }
            const R* v = row_of<const R>(job.readers, k0) + start;
            int64_t k = 0;
            for (; k + 4 <= readers; k += 4, v += 4 * job.readers.stride)
                dot_rows<A, R, 4>(y, count, v, job.readers.stride, depth, scores + k, width, start > 0);
            for (; k < readers; ++k, v += job.readers.stride)
                dot_rows<A, R, 1>(y, count, v, job.readers.stride, depth, scores + k, width, start > 0);
        }
        for (int64_t a = 0; a < count; ++a) {
            const double norm = job.normalise ? std::sqrt(squares[a]) : 1.0;
            const A* row = scores + a * width;
            if (job.out.dtype == DType::float64) write_scores(row, readers, norm, row_of<double>(job.out, first + a) + k0);
            else write_scores(row, readers, norm, row_of<float>(job.out, first + a) + k0);
        }
    });
}

void project(const Project& job) {
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
        if (job.readers.dtype == DType::float64) project_rows<double, T, double>(job);
        else project_rows<A, T, float>(job);
    });
}

}  // namespace
}  // namespace emocore
