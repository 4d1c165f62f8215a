// Scores: every row against every reader.
#pragma once

namespace emocore {
namespace {

// Rows that share one read of the readers, and those of many that go past a few at a time.
constexpr int64_t BAND_ROWS = 24, STREAM_ROWS = 16;

// What is made of score k, or of a vector of them.
template <class Value>
inline Value finished(const Project& job, Value score, int64_t k, Value norm) {
    const auto read = [&](const double* x) -> Value {
        if constexpr (std::is_same_v<Value, double>)
            return x[k];
        else
            return load<double>(x + k);
    };
    if (job.offset) score = score + read(job.offset);
    if (job.normalise) score = score / norm;
    if (job.mean) score = score - read(job.mean);
    if (job.std) score = score / read(job.std);
    return score;
}

// Scores k to k + count of a row, one rounding; those of a zero row are zeros already.    scores: `step` apart.
template <class A, class O>
[[gnu::noinline]] void write_scores(const Project& job, int64_t k, int64_t count, const A* scores, int64_t step,
                                    double norm, O* out) {
    constexpr int64_t W = LANES<double>;
    const bool plain = !job.offset && !job.normalise && !job.mean && !job.std;
    if (std::is_same_v<A, O> && step == 1 && plain) {
        std::memcpy(out, scores, count * sizeof(A));
        return;
    }
    int64_t i = 0;
    for (; step == 1 && i + W <= count; i += W)
        store(out + i, finished(job, load<double>(scores + i), k + i, broadcast(norm)));
    for (; i < count; ++i)
        out[i] = static_cast<O>(finished<double>(job, static_cast<double>(scores[i * step]), k + i, norm));
}

// out[r, k] = ((x_r - c) . v_k + offset_k - mean_k) / std_k, the first two over |x_r - c| when normalise.
// rows: [N, D], readers: [K, D] in parts, centre: [D], offset, mean, std: [K], out: [N, K].  A sums LANES partial
// sums along chains of CHAIN columns, then the chains: in the same order whatever rows and readers stand beside,
// and whichever way they are multiplied.
template <class A, class T, class R>
class ProjectRun {
  public:
    explicit ProjectRun(const Project& job)
        : job_(job),
          readers_(job),
          threads_(team(job.threads, N * D * ceil_div(K, 8))),
          centre_memory_(D * sizeof(A)),
          rows_{job.rows, array<A>(centre_memory_)} {
        A* centre = array<A>(centre_memory_);
        for (int64_t d = 0; d < D; ++d) centre[d] = job.centre ? static_cast<A>(job.centre[d]) : 0;
    }

    void run() const {
        if (K <= MOST_FEW && K <= N)
            few_readers();
        else if (N <= MOST_FEW)
            few_rows();
        else
            tiles();
    }

  private:
    static constexpr int64_t L = LANES<A>;

    // Threads share out bands of rows; where those are few, spans of lines too.
    void tiles() const {
        const int64_t lines = ceil_div(K, L), step = round_up(D, L) * L;
        const int64_t height = round_up(least(BAND_ROWS, ceil_div(N, threads_)), SHORT_ROWS);
        const int64_t bands = ceil_div(N, height);
        const int64_t width = round_up(ceil_div(lines, ceil_div(threads_, bands)), TILE_LINES);
        const int64_t spans = ceil_div(lines, width);
        const Scratch packed_memory(lines * step * sizeof(A)), y_memory(threads_ * height * CHAIN * sizeof(A));
        const Scratch score_memory(threads_ * height * width * L * sizeof(A));
        A* packed = array<A>(packed_memory);

        const auto after = [&](int64_t part) { return part < lines ? 0 : lines; };
        parallel(threads_, lines + bands * spans, after, [&](int member, int64_t part) {
            if (part < lines) return pack(part, packed + part * step);
            const int64_t first = (part - lines) / spans * height, line = (part - lines) % spans * width;
            const int64_t rows = least(height, N - first), count = least(width, lines - line);
            A* y = array<A>(y_memory) + member * height * CHAIN;
            A* scores = array<A>(score_memory) + member * height * width * L;
            double squares[BAND_ROWS] = {};
            std::memset(y + rows * CHAIN, 0, (height - rows) * CHAIN * sizeof(A));
            for (int64_t d = 0; d < D; d += CHAIN) {
                const int64_t depth = least(CHAIN, D - d);
                for (int64_t a = 0; a < rows; ++a) squares[a] += centred(first + a, d, depth, y + a * CHAIN);
                const Tiles<A> tiles{y,      packed + line * step + d * L, step,  ceil_div(depth, L),
                                     scores, width * L,                    d > 0, next(first, d, height)};
                tiles.multiply(rows, count);
            }
            for (int64_t a = 0; a < rows; ++a)
                finish(first + a, line * L, least(count * L, K - line * L), scores + a * width * L, 1, squares[a]);
        });
    }

    // The same rows' next chain, or the first of the rows that this thread may have next.
    Ahead next(int64_t first, int64_t d, int64_t height) const {
        const bool last = d + CHAIN >= D;
        const T* x = last ? rows_.row(first + threads_ * height) : rows_.row(first) + d + CHAIN;
        const int64_t depth = least(CHAIN, last ? D : D - d - CHAIN), size = sizeof(T);
        return {reinterpret_cast<const char*>(x), job_.rows.stride * size, ceil_div(depth * size, 64)};
    }

    void pack(int64_t line, A* lines) const {
        for (int64_t d = 0; d < D; d += CHAIN) pack_readers(readers_, line * L, d, least(CHAIN, D - d), lines + d * L);
    }

    void few_readers() const {
        const int64_t stride = round_up(D, L) + L;  // no power of two: the few would fall to one set of a cache
        const Scratch few_memory(MOST_FEW * stride * sizeof(A));
        A* few = array<A>(few_memory);
        std::memset(few, 0, MOST_FEW * stride * sizeof(A));
        for (int64_t k = 0; k < K; ++k) copy_columns(readers_, k, 0, D, few + k * stride);

        parallel(threads_, ceil_div(N, STREAM_ROWS), [&](int, int64_t part) {
            const int64_t first = part * STREAM_ROWS, count = least(STREAM_ROWS, N - first);
            A scores[STREAM_ROWS * MOST_FEW], y[CHAIN];
            with_padded(K, [&](auto few_count) {
                dot_rows<A, few_count>(rows_, first, count, D, few, stride, scores);
                for (int64_t a = 0; a < count; ++a) {
                    double squares = 0;
                    for (int64_t d = 0; job_.normalise && d < D; d += CHAIN)
                        squares += centred(first + a, d, least(CHAIN, D - d), y);
                    finish(first + a, 0, K, scores + a * few_count, 1, squares);
                }
            });
        });
    }

    void few_rows() const {
        const int64_t stride = round_up(D, L) + L;  // no power of two: the few would fall to one set of a cache
        const Scratch few_memory(MOST_FEW * stride * sizeof(A));
        A* few = array<A>(few_memory);
        std::memset(few, 0, MOST_FEW * stride * sizeof(A));
        double squares[MOST_FEW] = {};
        for (int64_t r = 0; r < N; ++r)
            for (int64_t d = 0; d < D; d += CHAIN)
                squares[r] += centred(r, d, least(CHAIN, D - d), few + r * stride + d);

        parallel(threads_, ceil_div(K, STREAM_ROWS), [&](int, int64_t part) {
            const int64_t k = part * STREAM_ROWS, count = least(STREAM_ROWS, K - k);
            A scores[STREAM_ROWS * MOST_FEW];
            with_padded(N, [&](auto few_count) {
                dot_rows<A, few_count>(readers_, k, count, D, few, stride, scores);
                for (int64_t r = 0; r < N; ++r) finish(r, k, count, scores + r, few_count, squares[r]);
            });
        });
    }

    // One chain of row r about the centre; its sum of squares where that is wanted.
    double centred(int64_t r, int64_t d, int64_t depth, A* y) const {
        copy_columns(rows_, r, d, depth, y);
        return job_.normalise ? sum_squares(y, depth) : 0;
    }

    void finish(int64_t r, int64_t k, int64_t count, const A* scores, int64_t step, double squares) const {
        const double norm = job_.normalise && squares > 0 ? std::sqrt(squares) : 1.0;
        if (job_.out.dtype == DType::float64)
            write_scores(job_, k, count, scores, step, norm, row_of<double>(job_.out, r) + k);
        else
            write_scores(job_, k, count, scores, step, norm, row_of<float>(job_.out, r) + k);
    }

    const Project& job_;
    const Readers<A, R> readers_;
    const int64_t N = job_.rows.rows, D = job_.rows.cols, K = readers_.K;
    const int threads_;
    const Scratch centre_memory_;
    const CentredRows<A, T> rows_;
};

void project(const Project& job) {
    if (job.rows.rows == 0) return;
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
        if (job.readers.dtype == DType::float64)
            ProjectRun<double, T, double>(job).run();
        else if (job.readers.dtype == DType::float32)
            ProjectRun<A, T, float>(job).run();
        else if constexpr (sizeof(T) == 2)
            ProjectRun<float, T, T>(job).run();
    });
}

}  // namespace
}  // namespace emocore
