// Sums and sums of squares per label: the first moments.
#pragma once

namespace emocore {
namespace {

// Rows of one label added together: each is a stream, and their sums pass through the registers once.
constexpr int64_t TOGETHER = 4;

// Rows put in order at a time.
constexpr int64_t SLAB = 16384;

// Mean length of the runs of a label below which its rows are brought together first.
constexpr int64_t SHORT_RUN = 8;

// Rows of one label, and those that are added after them.
template <class T>
struct Together {
    const T* x[TOGETHER];
    const T* next[TOGETHER];
    double weights[TOGETHER];
    const double* shift;
    double* sums;
    double* squares;
};

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

// sums += w (x - shift), squares += w (x - shift)^2 from column d on, row after row; float64 accumulators.
template <int64_t ROWS, bool SQUARES, bool WEIGHTED, bool WHOLE, class T>
void add_columns(const Together<T>& rows, int64_t d, int64_t columns) {
    const Vector<double> s = load_columns<WHOLE>(rows.shift + d, columns);
    Vector<double> sum = load_columns<WHOLE>(rows.sums + d, columns), square{};
    if constexpr (SQUARES) square = load_columns<WHOLE>(rows.squares + d, columns);
    for (int64_t r = 0; r < ROWS; ++r) {
        const Vector<double> y = load_columns<WHOLE>(rows.x[r] + d, columns) - s;
        if constexpr (WEIGHTED) {
            const Vector<double> w = broadcast(rows.weights[r]);
            sum = fma(w, y, sum);
            if constexpr (SQUARES) square = fma(w * y, y, square);
        } else {
            sum = sum + y;
            if constexpr (SQUARES) square = fma(y, y, square);
        }
    }
    store_columns<WHOLE>(rows.sums + d, sum, columns);
    if constexpr (SQUARES) store_columns<WHOLE>(rows.squares + d, square, columns);
}

template <int64_t ROWS, bool SQUARES, bool WEIGHTED, class T>
void add_together(const Together<T>& rows, int64_t first, int64_t last) {
    constexpr int64_t L = LANES<double>, LINE = 64 / sizeof(T);
    int64_t d = first;
    for (; d + LINE <= last; d += LINE) {
        // Rows brought together lie where no prefetcher looks.
        for (int64_t r = 0; r < ROWS; ++r) __builtin_prefetch(rows.next[r] + d, 0, 3);
        for (int64_t i = 0; i < LINE; i += L) add_columns<ROWS, SQUARES, WEIGHTED, true>(rows, d + i, L);
    }
    for (; d + L <= last; d += L) add_columns<ROWS, SQUARES, WEIGHTED, true>(rows, d, L);
    if (d < last) add_columns<ROWS, SQUARES, WEIGHTED, false>(rows, d, last - d);
}

// The labelled rows of a slab in the order in which they are added. Those of one label stay in the order of the
// rows, so where they stand between others changes no sum.
class Order {
  public:
    explicit Order(const LabelSums& job)
        : job_(job), rows_memory_(SLAB * sizeof(int64_t)), ends_memory_(job.sums.rows * sizeof(int64_t)) {}

    void set(int64_t first, int64_t last) {
        count_ = 0;
        int64_t runs = 0, before = -1;
        for (int64_t r = first; r < last; ++r) {
            const int64_t k = label(r);
            if (k < 0) continue;
            runs += k != before;
            before = k;
            rows()[count_++] = r;
        }
        if (runs * SHORT_RUN > count_) sort(first, last);
    }

    int64_t count() const { return count_; }
    int64_t row(int64_t i) const { return rows()[least(i, count_ - 1)]; }
    int64_t label(int64_t row) const { return job_.labels ? job_.labels[row] : 0; }

  private:
    int64_t* rows() const { return array<int64_t>(rows_memory_); }

    void sort(int64_t first, int64_t last) {
        const int64_t K = job_.sums.rows;
        int64_t* ends = array<int64_t>(ends_memory_);
        std::memset(ends, 0, K * sizeof(int64_t));
        for (int64_t i = 0; i < count_; ++i) ++ends[label(rows()[i])];
        for (int64_t k = 1; k < K; ++k) ends[k] += ends[k - 1];
        for (int64_t r = last - 1; r >= first; --r)
            if (const int64_t k = label(r); k >= 0) rows()[--ends[k]] = r;
    }

    const LabelSums& job_;
    const Scratch rows_memory_, ends_memory_;
    int64_t count_ = 0;
};

template <class T, bool SQUARES, bool WEIGHTED>
void add_labelled(const LabelSums& job, const Order& order, int64_t first, int64_t last) {
    Together<T> rows{};
    rows.shift = job.shift;
    const auto picked = [&](int64_t i) { return row_of<const T>(job.rows, order.row(i)); };
    const auto take = [&](auto count, int64_t i, int64_t k) {
        for (int64_t r = 0; r < count; ++r) {
            rows.x[r] = picked(i + r);
            rows.next[r] = picked(i + count + r);
            if constexpr (WEIGHTED) rows.weights[r] = job.weights[order.row(i + r)];
        }
        rows.sums = row_of<double>(job.sums, k);
        if constexpr (SQUARES) rows.squares = row_of<double>(job.squares, k);
        add_together<count, SQUARES, WEIGHTED>(rows, first, last);
    };
    using One = std::integral_constant<int64_t, 1>;
    using All = std::integral_constant<int64_t, TOGETHER>;
    for (int64_t i = 0; i < order.count();) {
        const int64_t k = order.label(order.row(i));
        int64_t count = 1;
        while (count < TOGETHER && i + count < order.count() && order.label(order.row(i + count)) == k) ++count;
        if (count == TOGETHER)
            take(All{}, i, k);
        else
            for (int64_t r = 0; r < count; ++r) take(One{}, i + r, k);
        i += count;
    }
}

// sums[k] += w (x - shift), squares[k] += w (x - shift)^2, k = labels[r]; label -1 is skipped.
// rows: [N, D], labels: [N], weights: [N], shift: [D], sums, squares: [K, D] float64.
// Threads own columns and take the rows of a label in order: no split of rows or columns changes a bit.
void label_sums(const LabelSums& job) {
    const int64_t N = job.rows.rows, D = job.rows.cols;
    const int threads = team(job.threads, N * D);
    const int64_t columns = ceil_div(ceil_div(D, threads), 32) * 32;
    Order order(job);
    const auto add = [&](auto element, auto squares, auto weighted) {
        using T = decltype(element);
        parallel(threads, ceil_div(D, columns), [&](int, int64_t part) {
            const int64_t first = part * columns;
            add_labelled<T, squares, weighted>(job, order, first, least(D, first + columns));
        });
    };
    using Yes = std::true_type;
    using No = std::false_type;
    for (int64_t first = 0; first < N; first += SLAB) {
        order.set(first, least(N, first + SLAB));
        with_element(job.rows.dtype, [&](auto element) {
            if (job.weights)
                job.squares.data ? add(element, Yes{}, Yes{}) : add(element, No{}, Yes{});
            else
                job.squares.data ? add(element, Yes{}, No{}) : add(element, No{}, No{});
        });
    }
}

}  // namespace
}  // namespace emocore
