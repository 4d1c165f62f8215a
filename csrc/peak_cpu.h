// The most that a set can do: multiply-adds on registers alone, that wait for nothing but their own last turn.
#pragma once

namespace emocore {
namespace {

constexpr int64_t SUMS = 12;  // in flight: more than the latency of a unit times how many there are

// sum = sum x + y, `turns` times for each sum; returns the operations.
template <class A>
double multiply_adds(int64_t turns) {
    const Vector<A> x = broadcast(A(0.5)), y = broadcast(A(1));
    Vector<A> sum[SUMS];
    for (Vector<A>& one : sum) one = y;
    for (int64_t turn = 0; turn < turns; ++turn)
        for (Vector<A>& one : sum) one = fma(one, x, y);
    for (int64_t i = 1; i < SUMS; ++i) sum[0] = sum[0] + sum[i];
    volatile A kept = total(sum[0]);
    (void)kept;
    return 2.0 * turns * SUMS * LANES<A>;
}

// Every member of the team does the same; returns what one of them does, times how many there are.
template <class Body>
double peak_of(const Peak& job, const Body& body) {
    double operations = 0;
    parallel(job.threads, job.threads, [&](int, int64_t part) {
        const double done = body(job.turns);
        if (part == 0) operations = done * job.threads;
    });
    return operations;
}

// bfloat16 rows are widened: their products are those of float32.
double peak(const Peak& job) {
    return peak_of(job, job.arithmetic == DType::float64 ? multiply_adds<double> : multiply_adds<float>);
}

}  // namespace
}  // namespace emocore
