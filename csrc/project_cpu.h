// Scores: every row against every reader.
#pragma once

namespace emocore {
namespace {

// Rows that share one read of the readers.
constexpr int64_t PROJECT_ROWS = 48;

// y = x - centre over one chain of columns, then zeros to a whole vector.
// x, centre: [depth], y: [CHAIN] in A.
template <class A, class T>
void centre_row(const T* x, const A* centre, int64_t depth, A* y) {
    constexpr int64_t L = LANES<A>;
    int64_t d = 0;
    for (; d + L <= depth; d += L) {
        // The rows beside this one come first: ask for its next chain before the stream is forgotten.
        if (d * sizeof(T) % 64 == 0) __builtin_prefetch(x + d + CHAIN);
        store(y + d, load<A>(x + d) - load<A>(centre + d));
    }
    if (d < depth) store(y + d, load_some<A>(x + d, depth - d) - load_some<A>(centre + d, depth - d));
}

// sum y^2, float64 accumulators.    y: [depth] in A, zero to a whole vector.
template <class A>
double sum_squares(const A* y, int64_t depth) {
    constexpr int64_t W = LANES<double>;
    Vector<double> even{}, odd{};
    for (int64_t d = 0; d < depth; d += 2 * W) {
        const Vector<double> a = load<double>(y + d);
        even = fma(a, a, even);
        if (d + W >= depth) break;
        const Vector<double> b = load<double>(y + d + W);
        odd = fma(b, b, odd);
    }
    return total(even + odd);
}

// One chain of columns of some rows against some readers.
template <class A, class R>
struct Dots {
    const A* y;        // [rows, CHAIN], zero past depth
    const R* readers;  // [K, reader_stride]
    int64_t reader_stride;
    int64_t depth;
    A* scores;  // [rows, score_stride]
    int64_t score_stride;
    bool add;
};

// scores[row + a, k + b] (+)= y[row + a] . readers[k + b], a < ROWS, b < READERS: LANES partial sums in A.
template <class A, class R, int64_t ROWS, int64_t READERS>
void dot_block(const Dots<A, R>& dots, int64_t row, int64_t k) {
    constexpr int64_t L = LANES<A>;
    const A* y = dots.y + row * CHAIN;
    const R* readers = dots.readers + k * dots.reader_stride;
    const int64_t stride = dots.reader_stride, depth = dots.depth;
    Vector<A> sum[ROWS][READERS] = {};
    int64_t d = 0;
    for (; d + L <= depth; d += L) {
        for (int64_t b = 0; b < READERS; ++b) {
            const Vector<A> v = load<A>(readers + b * stride + d);
            for (int64_t a = 0; a < ROWS; ++a) sum[a][b] = fma(load<A>(y + a * CHAIN + d), v, sum[a][b]);
        }
    }
    for (int64_t b = 0; d < depth && b < READERS; ++b) {
        const Vector<A> v = load_some<A>(readers + b * stride + d, depth - d);
        for (int64_t a = 0; a < ROWS; ++a) sum[a][b] = fma(load<A>(y + a * CHAIN + d), v, sum[a][b]);
    }
    for (int64_t a = 0; a < ROWS; ++a) {
        for (int64_t b = 0; b < READERS; ++b) {
            A& score = dots.scores[(row + a) * dots.score_stride + k + b];
            score = dots.add ? score + total(sum[a][b]) : total(sum[a][b]);
        }
    }
}

template <class A, class R, int64_t READERS>
void dot_rows(const Dots<A, R>& dots, int64_t rows, int64_t k) {
    constexpr int64_t ROWS = REGISTERS == 32 ? 6 : 3;
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) dot_block<A, R, ROWS, READERS>(dots, row, k);
    for (; row < rows; ++row) dot_block<A, R, 1, READERS>(dots, row, k);
}

// 3 rows by 4 readers: 12 sums, 3 rows and a reader fill 16 registers; twice the rows where there are 32.
template <class A, class R>
void dot_all(const Dots<A, R>& dots, int64_t rows, int64_t K) {
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) dot_rows<A, R, 4>(dots, rows, k);
    for (; k < K; ++k) dot_rows<A, R, 1>(dots, rows, k);
}

// scores / norm, one rounding; the scores of a zero row are zeros already.
template <class A, class O>
void write_scores(const A* scores, int64_t K, double norm, O* out) {
    for (int64_t k = 0; k < K; ++k) {
        const double score = scores[k];
        out[k] = static_cast<O>(norm > 0 ? score / norm : score);
    }
}

// Rows [first, first + count) against readers [k, k + K).    y: [count, CHAIN], scores: [count, K].
template <class A, class T, class R>
void project_band(const Project& job, const A* centre, int64_t first, int64_t count, int64_t k, int64_t K,
                  A* y, A* scores) {
    const int64_t D = job.rows.cols;
    double squares[PROJECT_ROWS] = {};
    for (int64_t d = 0; d < D; d += CHAIN) {
        const int64_t depth = least(CHAIN, D - d);
        for (int64_t a = 0; a < count; ++a) {
            centre_row(row_of<const T>(job.rows, first + a) + d, centre + d, depth, y + a * CHAIN);
            if (job.normalise) squares[a] += sum_squares(y + a * CHAIN, depth);
        }
        const R* readers = row_of<const R>(job.readers, k) + d;
        dot_all(Dots<A, R>{y, readers, job.readers.stride, depth, scores, K, d > 0}, count, K);
    }
    for (int64_t a = 0; a < count; ++a) {
        const double norm = job.normalise ? std::sqrt(squares[a]) : 1.0;
        const A* row = scores + a * K;
        if (job.out.dtype == DType::float64)
            write_scores(row, K, norm, row_of<double>(job.out, first + a) + k);
        else
            write_scores(row, K, norm, row_of<float>(job.out, first + a) + k);
    }
}

// out[r, k] = (x_r - c) . v_k, over |x_r - c| when normalise.
// rows: [N, D], readers: [K, D], centre: [D], out: [N, K];  A sums LANES partial sums along chains of CHAIN
// columns, then the chains: in the same order whatever rows and readers stand beside.
template <class A, class T, class R>
void project_rows(const Project& job) {
    const int64_t N = job.rows.rows, D = job.rows.cols, K = job.readers.rows;
    if (N == 0) return;
    const int threads = team(job.threads, N * D * ceil_div(K, 8));
    // Threads share out bands of rows; where those are few, groups of readers too.
    const int64_t height = least(PROJECT_ROWS, ceil_div(N, threads)), bands = ceil_div(N, height);
    const int64_t width = ceil_div(ceil_div(K, ceil_div(threads, bands)), 4) * 4, groups = ceil_div(K, width);

    const Scratch centre_memory(D * sizeof(A)), y_memory(threads * height * CHAIN * sizeof(A));
    const Scratch score_memory(threads * height * width * sizeof(A));
    A* centre = array<A>(centre_memory);
    for (int64_t d = 0; d < D; ++d) centre[d] = job.centre ? static_cast<A>(job.centre[d]) : 0;

    parallel(threads, bands * groups, [&](int member, int64_t part) {
        const int64_t first = part / groups * height, k = part % groups * width;
        A* y = array<A>(y_memory) + member * height * CHAIN;
        A* scores = array<A>(score_memory) + member * height * width;
        project_band<A, T, R>(job, centre, first, least(height, N - first), k, least(width, K - k), y,
                              scores);
    });
}

void project(const Project& job) {
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
        if (job.readers.dtype == DType::float64)
            project_rows<double, T, double>(job);
        else
            project_rows<A, T, float>(job);
    });
}

}  // namespace
}  // namespace emocore
