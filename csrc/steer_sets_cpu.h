// Rows edited by slot: a vector added, and scores moved to targets.
#pragma once

namespace emocore {
namespace {

// A few rows that are edited together.
template <class T>
struct Group {
    const T* x[EDIT_ROWS];
    T* out[EDIT_ROWS];
    int64_t entry[EDIT_ROWS];  // of the tables
    int64_t count = 0;
};

// moves[a, r] = gate (target - x[a] . basis[r]): exactly 0 where the gate is.    moves: [count, R] in A.
template <class A, class T>
void find_moves(const SteerEdit& job, const Group<T>& group, A* moves) {
    const int64_t R = job.basis.rows;
    score_rows<A, T>(group.x, group.count, 0, job.basis, moves);
    for (int64_t a = 0; a < group.count; ++a) {
        const A* target = row_of<const A>(job.target, group.entry[a]);
        const A* gate = job.gate.data ? row_of<const A>(job.gate, group.entry[a]) : nullptr;
        for (int64_t r = 0; r < R; ++r) {
            A& move = moves[a * R + r];
            move = target[r] - move;
            if (gate) move = gate[r] != 0 ? gate[r] * move : 0;
        }
    }
}

// out[a] = x[a] + delta[a] + sum_r moves[a, r] dual[r], one rounding to T.    A null delta is zero.
// RANK: R, or 0 for any;  `ahead` elements on are the rows that come next.
template <class A, class T, int64_t ROWS, int64_t RANK>
void move_rows(const T* const* x, int64_t ahead, const A* const* delta, const A* moves, const Rows& dual,
               int64_t D, T* const* out) {
    constexpr int64_t L = LANES<A>;
    const int64_t R = RANK ? RANK : dual.rows;
    const auto move_columns = [&](auto whole, int64_t d) {
        const auto read = [&](const auto* from) {
            if constexpr (decltype(whole)::value)
                return load<A>(from + d);
            else
                return load_some<A>(from + d, D - d);
        };
        Vector<A> y[ROWS];
        for (int64_t a = 0; a < ROWS; ++a) {
            __builtin_prefetch(x[a] + d + ahead);
            y[a] = delta ? read(x[a]) + read(delta[a]) : read(x[a]);
        }
        for (int64_t r = 0; r < R; ++r) {
            const Vector<A> v = read(row_of<const A>(dual, r));
            for (int64_t a = 0; a < ROWS; ++a) y[a] = fma(broadcast(moves[a * R + r]), v, y[a]);
        }
        for (int64_t a = 0; a < ROWS; ++a) {
            if constexpr (decltype(whole)::value)
                store(out[a] + d, y[a]);
            else
                store_some<A>(out[a] + d, D - d, y[a]);
        }
    };
    int64_t d = 0;
    for (; d + L <= D; d += L) move_columns(std::true_type{}, d);
    if (d < D) move_columns(std::false_type{}, d);
}

// A vector alone is added row by row: there is nothing to share, and one stream is read faster than several.
template <class A, class T>
void edit_group(const SteerEdit& job, const Group<T>& group, A* moves) {
    const int64_t D = job.rows.cols, R = job.basis.rows, stride = job.rows.stride;
    if (R > 0) find_moves<A, T>(job, group, moves);
    const A* each[EDIT_ROWS];
    for (int64_t a = 0; job.deltas.data && a < group.count; ++a)
        each[a] = row_of<const A>(job.deltas, group.entry[a]);
    const A* const* delta = job.deltas.data ? each : nullptr;
    if (R > 0 && group.count == EDIT_ROWS) {
        const auto move = [&](auto rank) {
            move_rows<A, T, EDIT_ROWS, rank>(group.x, EDIT_ROWS * stride, delta, moves, job.dual, D, group.out);
        };
        return R <= 4 ? with_few(R, move) : move(std::integral_constant<int64_t, 0>{});
    }
    for (int64_t a = 0; a < group.count; ++a)
        move_rows<A, T, 1, 0>(group.x + a, R > 0 ? 0 : stride, delta ? delta + a : nullptr, moves + a * R, job.dual,
                              D, group.out + a);
}

// Rows [first, last): those with a slot are edited, the others keep their bits, and in place are not written.
template <class A, class T>
void edit_part(const SteerEdit& job, int64_t first, int64_t last, const int32_t* slot, A* moves) {
    Group<T> group;
    for (int64_t r = first; r < last; ++r) {
        const T* x = row_of<const T>(job.rows, r);
        T* out = row_of<T>(job.out, r);
        if (slot[r - first] > 0) {
            group.x[group.count] = x;
            group.out[group.count] = out;
            group.entry[group.count++] = slot[r - first] - job.first_slot;
        } else if (x != out) {
            std::memcpy(out, x, job.rows.cols * sizeof(T));
        }
        if (group.count < EDIT_ROWS && r + 1 < last) continue;
        edit_group<A, T>(job, group, moves);
        group.count = 0;
    }
}

// out = x + deltas_s + sum_r gate_sr (target_sr - x . basis_r) dual_r by the slot s of the row, rounded once; the
// very bits of x where it has none.
// rows, out: [N, D], deltas: [S, D], basis, dual: [R, D], target, gate: [S, R];  in float32, in float64 for
// float64 rows. A row is read from memory once: what looks at it again finds it in cache.
void steer_edit(const SteerEdit& job) {
    const int64_t N = job.rows.rows, D = job.rows.cols;
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
        const int threads = team(job.threads, N * D);
        const int64_t step = edited_rows_per_part(N, D * sizeof(T), threads);
        const int64_t scores = EDIT_ROWS * most(job.basis.rows, job.slots.readers.rows);
        const Scratch score_memory(threads * scores * sizeof(A)), slot_memory(threads * step * sizeof(int32_t));
        parallel(threads, ceil_div(N, step), [&](int member, int64_t part) {
            const int64_t first = part * step, last = least(N, first + step);
            int32_t* slot = array<int32_t>(slot_memory) + member * step;
            A* own = array<A>(score_memory) + member * scores;
            find_slots<A, T>(job.slots, job.rows, first, last, slot, own);
            edit_part<A, T>(job, first, last, slot, own);
        });
    });
}

}  // namespace
}  // namespace emocore
