// Sums and sums of squares per label: the first moments.
#pragma once

namespace emocore {
namespace {

// Rows added while their sums stay in registers: few enough that each is a stream the prefetcher follows.
constexpr int64_t RUN_ROWS = 8;

// Sums that one pass over the rows may touch: they should stay in the second-level cache.
constexpr int64_t PASS_BYTES = 512 * 1024;

template <bool WHOLE, class T>
Vector<double> load_columns(const T* x, int64_t columns) {
    if constexpr (WHOLE)
        return load<double>(x);
    else
        return load_some<double>(x, columns);
}

template <bool WHOLE>
void store_columns(double* out, Vector<double> x, int64_t columns) {
    if constexpr (WHOLE)
        store(out, x);
    else
        store_some<double>(out, columns, x);
}

// sums += w (x - shift), squares += w (x - shift)^2, row after row.
// x: [count, columns], w: [count] or null, shift, sums, squares: [columns];  float64 accumulators.
// WHOLE: columns = VECTORS * LANES. Otherwise VECTORS is 1 and columns < LANES.
template <class T, bool SQUARES, int64_t VECTORS, bool WHOLE>
void add_rows(const T* x, int64_t stride, const double* w, int64_t count, const double* shift, double* sums,
              double* squares, int64_t columns) {
    constexpr int64_t L = LANES<double>;
    Vector<double> sum[VECTORS], square[VECTORS], s[VECTORS];
    for (int64_t i = 0; i < VECTORS; ++i) {
        s[i] = load_columns<WHOLE>(shift + i * L, columns);
        sum[i] = load_columns<WHOLE>(sums + i * L, columns);
        if constexpr (SQUARES) square[i] = load_columns<WHOLE>(squares + i * L, columns);
    }
    for (int64_t r = 0; r < count; ++r) {
        const Vector<double> weight = broadcast(w ? w[r] : 1.0);
        // Into the second level: the first holds the run at hand.
        __builtin_prefetch(x + (r + 2 * RUN_ROWS) * stride, 0, 2);
        for (int64_t i = 0; i < VECTORS; ++i) {
            const Vector<double> y = load_columns<WHOLE>(x + r * stride + i * L, columns) - s[i];
            sum[i] = fma(weight, y, sum[i]);
            if constexpr (SQUARES) square[i] = fma(weight * y, y, square[i]);
        }
    }
    for (int64_t i = 0; i < VECTORS; ++i) {
        store_columns<WHOLE>(sums + i * L, sum[i], columns);
        if constexpr (SQUARES) store_columns<WHOLE>(squares + i * L, square[i], columns);
    }
}

// `count` rows of one label, from row r, into columns [first, last).
template <class T, bool SQUARES>
void add_run(const LabelSums& job, int64_t r, int64_t count, int64_t k, int64_t first, int64_t last) {
    constexpr int64_t L = LANES<double>;
    const T* x = row_of<const T>(job.rows, r);
    const double* w = job.weights ? job.weights + r : nullptr;
    double* sums = row_of<double>(job.sums, k);
    double* squares = SQUARES ? row_of<double>(job.squares, k) : nullptr;
    const auto add = [&](auto vectors, auto whole, int64_t d, int64_t columns) {
        add_rows<T, SQUARES, vectors, whole>(x + d, job.rows.stride, w, count, job.shift + d, sums + d,
                                             SQUARES ? squares + d : nullptr, columns);
    };
    using One = std::integral_constant<int64_t, 1>;
    using Four = std::integral_constant<int64_t, 4>;
    int64_t d = first;
    for (; d + 4 * L <= last; d += 4 * L) add(Four{}, std::true_type{}, d, 4 * L);
    for (; d + L <= last; d += L) add(One{}, std::true_type{}, d, L);
    if (d < last) add(One{}, std::false_type{}, d, last - d);
}

template <class T, bool SQUARES>
void add_labelled(const LabelSums& job, int64_t first, int64_t last) {
    const int64_t N = job.rows.rows;
    for (int64_t r = 0; r < N;) {
        const int64_t k = job.labels ? job.labels[r] : 0;
        int64_t count = 1;
        while (count < RUN_ROWS && r + count < N && (!job.labels || job.labels[r + count] == k)) ++count;
        if (k >= 0) add_run<T, SQUARES>(job, r, count, k, first, last);
        r += count;
    }
}

// sums[k] += w (x - shift), squares[k] += w (x - shift)^2, k = labels[r]; label -1 is skipped.
// rows: [N, D], labels: [N], weights: [N], shift: [D], sums, squares: [K, D] float64.
// Threads own columns and take the rows in order: no split of rows or columns changes a bit.
void label_sums(const LabelSums& job) {
    const int64_t N = job.rows.rows, D = job.rows.cols, K = job.sums.rows;
    const bool squares = job.squares.data != nullptr;
    const int threads = team(job.threads, N * D);
    const int64_t cached = PASS_BYTES / (K * static_cast<int64_t>(sizeof(double)) * (squares ? 2 : 1));
    const int64_t share = least(ceil_div(D, threads), most(cached, 64));
    const int64_t columns = ceil_div(share, 16) * 16;
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        parallel(threads, ceil_div(D, columns), [&](int, int64_t part) {
            const int64_t first = part * columns, last = least(D, first + columns);
            if (squares)
                add_labelled<T, true>(job, first, last);
            else
                add_labelled<T, false>(job, first, last);
        });
    });
}

}  // namespace
}  // namespace emocore
