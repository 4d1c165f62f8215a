// Scores of the rows of a sequence pooled: the largest and the mean.
#pragma once

namespace emocore {
namespace {

// largest[k], mean[k] over rows [first, end); NaN where there are none, and where the mean is.
// scores: [N, K], largest, mean: [K], sum: [K] float64.
template <class T>
void pool_sequence(const Rows& scores, int64_t first, int64_t end, double* sum, float* largest, float* mean) {
    const int64_t K = scores.cols;
    for (int64_t k = 0; k < K; ++k) {
        sum[k] = 0;
        largest[k] = -INFINITY;
    }
    for (int64_t r = first; r < end; ++r) {
        const T* row = row_of<const T>(scores, r);
        for (int64_t k = 0; k < K; ++k) {
            const float score = static_cast<float>(row[k]);
            sum[k] += static_cast<double>(row[k]);
            largest[k] = score > largest[k] ? score : largest[k];
        }
    }
    const double count = static_cast<double>(most(0, end - first));
    for (int64_t k = 0; k < K; ++k) {
        mean[k] = static_cast<float>(sum[k] / count);
        largest[k] = mean[k] == mean[k] ? largest[k] : NAN;
    }
}

// scores: [N, K], starts: [B + 1], largest, mean: [B, K];  float64 adds the rows in order.
template <class T>
void pool_all(const PoolScores& job) {
    const int64_t B = job.mean.rows, K = job.scores.cols;
    const int threads = team(job.threads, job.scores.rows * K);
    const Scratch sum_memory(threads * K * sizeof(double));
    parallel(threads, B, [&](int member, int64_t b) {
        pool_sequence<T>(job.scores, job.starts[b], job.starts[b + 1], array<double>(sum_memory) + member * K,
                         row_of<float>(job.largest, b), row_of<float>(job.mean, b));
    });
}

void pool_scores(const PoolScores& job) {
    if (job.scores.dtype == DType::float64)
        pool_all<double>(job);
    else
        pool_all<float>(job);
}

}  // namespace
}  // namespace emocore
