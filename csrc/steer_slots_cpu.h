// Which rows are steered: those of a slot, whose scores are above its levels.
#pragma once

namespace emocore {
namespace {

// Rows that a thread edits at a time: they stay in its second-level cache, and what it asks for ahead of them, which
// may be another thread's, is little beside.
inline int64_t edited_rows_per_part(int64_t rows, int64_t row_bytes, int threads) {
    const int64_t fair = ceil_div(rows, threads), cached = 262144 / row_bytes;
    return ceil_div(most(1, least(fair, cached)), EDIT_ROWS) * EDIT_ROWS;
}

// The slot of a row, 0 where it has none, or one past the tables.
inline int32_t slot_of(const RowSlots& slots, int64_t row) {
    if (!slots.of) return 1;
    const int32_t slot = slots.of[row / slots.share];
    return slot > 0 && slot < slots.size ? slot : 0;
}

template <class A>
bool all_above(const A* scores, const A* levels, int64_t W) {
    for (int64_t w = 0; w < W; ++w)
        if (!(scores[w] > levels[w])) return false;
    return true;
}

// found[r - first] = the slot of row r, 0 where a score is not above the slot's level.
// rows: [N, D], readers: [W, D], levels: [S, W], found: [last - first], scores: [EDIT_ROWS, W] in A.
template <class A, class T>
void find_slots(const RowSlots& slots, const Rows& rows, int64_t first, int64_t last, int32_t* found, A* scores) {
    for (int64_t r = first; r < last; ++r) found[r - first] = slot_of(slots, r);
    const int64_t W = slots.readers.rows;
    if (W == 0) return;
    const T* x[EDIT_ROWS];
    int32_t* slot[EDIT_ROWS];
    int64_t count = 0;
    for (int64_t r = first; r < last; ++r) {
        if (found[r - first] > 0) {
            x[count] = row_of<const T>(rows, r);
            slot[count++] = found + (r - first);
        }
        if (count < EDIT_ROWS && r + 1 < last) continue;
        score_rows<A, T>(x, count, EDIT_ROWS * rows.stride, slots.readers, scores);
        for (int64_t a = 0; a < count; ++a)
            if (!all_above(scores + a * W, row_of<const A>(slots.levels, *slot[a]), W)) *slot[a] = 0;
        count = 0;
    }
}

// out[r] = the slot of row r, 0 where a score is not above the slot's level: the bits by which steer_edit decides.
// rows: [N, D], out: [N];  scores in float32, in float64 for float64 rows.
void steer_slots(const SteerSlots& job) {
    const int64_t N = job.rows.rows, D = job.rows.cols, W = job.slots.readers.rows;
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
        const int threads = team(job.threads, N * D);
        const int64_t step = edited_rows_per_part(N, D * sizeof(T), threads);
        const Scratch memory(threads * EDIT_ROWS * W * sizeof(A));
        parallel(threads, ceil_div(N, step), [&](int member, int64_t part) {
            const int64_t first = part * step;
            find_slots<A, T>(job.slots, job.rows, first, least(N, first + step), job.out + first,
                             array<A>(memory) + member * EDIT_ROWS * W);
        });
    });
}

}  // namespace
}  // namespace emocore
