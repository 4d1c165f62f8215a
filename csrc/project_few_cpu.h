// Few rows or few readers against the others, which stream by: lanes of columns, totalled at the end of a chain.
#pragma once

namespace emocore {
namespace {

constexpr int64_t MOST_FEW = REGISTERS == 32 ? 16 : 8;

// Bytes that are asked for ahead of a stream, and of few rows that stay in the first-level cache with it.
constexpr int64_t STREAM_AHEAD = 8192, NEAR_BYTES = 24576;

// scores[f] += row . few[f] over a chain of columns from d on.
// few: [FEW, stride], zeros past D to a whole vector, scores: [FEW].
template <class A, int64_t FEW, class Source>
void dot_chain(const Source& many, int64_t row, const void* ahead, int64_t d, int64_t depth, const A* few,
               int64_t stride, A* scores) {
    constexpr int64_t L = LANES<A>, SIZE = sizeof(typename Source::Element);
    Vector<A> sum[FEW] = {};
    int64_t i = d;
    for (; i + L <= d + depth; i += L) {
        if ((i - d) * SIZE % 64 == 0) __builtin_prefetch(static_cast<const char*>(ahead) + (i - d) * SIZE);
        const Vector<A> x = many.template columns<true>(row, i, L);
        for (int64_t f = 0; f < FEW; ++f) sum[f] = fma(x, load<A>(few + f * stride + i), sum[f]);
    }
    if (i < d + depth) {
        const Vector<A> x = many.template columns<false>(row, i, d + depth - i);
        for (int64_t f = 0; f < FEW; ++f) sum[f] = fma(x, load<A>(few + f * stride + i), sum[f]);
    }
    for (int64_t f = 0; f < FEW; ++f) scores[f] += total(sum[f]);
}

// scores[m, f] = many[first + m] . few[f], m < count.    few: [FEW, stride], scores: [count, FEW].
// Row by row where the few stay near; else by chains, whose columns of the few do.
template <class A, int64_t FEW, class Source>
[[gnu::noinline]] void dot_rows(const Source& many, int64_t first, int64_t count, int64_t D, const A* few, int64_t stride, A* scores) {
    const bool near = FEW * D * static_cast<int64_t>(sizeof(A)) <= NEAR_BYTES;
    const int64_t height = near ? 1 : count;
    std::memset(scores, 0, count * FEW * sizeof(A));
    for (int64_t m = 0; m < count; m += height) {
        for (int64_t d = 0; d < D; d += CHAIN) {
            for (int64_t a = m; a < m + height; ++a) {
                const auto* x = many.row(first + a);
                const auto* next = d + CHAIN < D ? x + d + CHAIN : many.row(first + a + count);
                const void* ahead = near ? reinterpret_cast<const char*>(x + d) + STREAM_AHEAD
                                         : reinterpret_cast<const char*>(next);
                dot_chain<A, FEW>(many, first + a, ahead, d, least(CHAIN, D - d), few, stride, scores + a * FEW);
            }
        }
    }
}

// body(FEW), a constant of at least `few` to unroll by.
template <class Body>
void with_padded(int64_t few, const Body& body) {
    if (few == 1)
        body(std::integral_constant<int64_t, 1>{});
    else if (few == 2)
        body(std::integral_constant<int64_t, 2>{});
    else if (few <= 4)
        body(std::integral_constant<int64_t, 4>{});
    else if (few <= 8)
        body(std::integral_constant<int64_t, 8>{});
    else
        body(std::integral_constant<int64_t, MOST_FEW>{});
}

}  // namespace
}  // namespace emocore
