// What project multiplies: readers that are sums of parts, and rows about a centre, a vector of columns at a time.
#pragma once

namespace emocore {
namespace {

// load, or load_some where fewer than LANES columns are left.
template <class A, bool WHOLE, class T>
Vector<A> load_columns(const T* x, int64_t count) {
    return WHOLE || count >= LANES<A> ? load<A>(x) : load_some<A>(x, count);
}

// [K, D] in A, in R the parts that add up to it.
template <class A, class R>
struct Readers {
    using Element = R;

    explicit Readers(const Project& job) : rows(job.readers), parts(job.parts), K(job.readers.rows / job.parts) {}

    // Columns from d on: LANES of them if WHOLE, else the first `count`, then zeros.
    template <bool WHOLE>
    Vector<A> columns(int64_t k, int64_t d, int64_t count) const {
        Vector<A> sum = load_columns<A, WHOLE>(row(k) + d, count);
        for (int64_t part = 1; part < parts; ++part)
            sum = sum + load_columns<A, WHOLE>(row(part * K + k) + d, count);
        return sum;
    }
    const R* row(int64_t k) const { return row_of<const R>(rows, k); }

    const Rows rows;
    const int64_t parts, K;
};

// x - centre in A.    x: [N, D], centre: [D].
template <class A, class T>
struct CentredRows {
    using Element = T;

    template <bool WHOLE>
    Vector<A> columns(int64_t r, int64_t d, int64_t count) const {
        return load_columns<A, WHOLE>(row(r) + d, count) - load_columns<A, WHOLE>(centre + d, count);
    }
    const T* row(int64_t r) const { return row_of<const T>(rows, r); }

    const Rows rows;
    const A* centre;
};

// Row r of a source in A, then zeros to a whole vector.    y: [D to a whole vector].
template <class A, class Source>
[[gnu::noinline]] void copy_columns(const Source& source, int64_t r, int64_t d, int64_t depth, A* y) {
    constexpr int64_t L = LANES<A>;
    int64_t i = 0;
    for (; i + L <= depth; i += L) {
        // The rows beside this one come first: ask for its next chain before the stream is forgotten.
        if (i * sizeof(typename Source::Element) % 64 == 0) __builtin_prefetch(source.row(r) + d + i + CHAIN);
        store(y + i, source.template columns<true>(r, d + i, L));
    }
    if (i < depth) store(y + i, source.template columns<false>(r, d + i, depth - i));
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

}  // namespace
}  // namespace emocore
