#pragma once

namespace emocore {
namespace {

// Packed rows that are multiplied before the next are packed: they should stay in the last-level cache.
constexpr int64_t PACKED_BYTES = 4 << 20;

// Rows that one thread packs at a time.
constexpr int64_t PACK_ROWS = 16;

// y = (x - shift) sqrt(w), in A, as panels of columns: [panel, CHAIN, PANEL], zero past D.
template <class A, class T>
void pack_rows(const Gram& job, const A* shift, int64_t first, int64_t count, A* packed) {
    constexpr int64_t L = LANES<A>, P = PANEL<A>;
    const int64_t D = job.rows.cols;
    A root[PACK_ROWS];
    for (int64_t r = 0; r < count; ++r)
        root[r] = static_cast<A>(job.weights ? std::sqrt(job.weights[first + r]) : 1.0);
    // Few rows at a time through every panel: reads are streams, writes are whole lines, neither strides far.
    for (int64_t d = 0; d < D; d += P, packed += CHAIN * P) {
        for (int64_t r = 0; r < count; ++r) {
            const T* x = row_of<const T>(job.rows, first + r) + d;
            const Vector<A> weight = broadcast(root[r]);
            for (int64_t i = 0; i < P; i += L) {
                const int64_t columns = most(0, D - d - i);
                const Vector<A> v = columns >= L ? load<A>(x + i) : load_some<A>(x + i, columns);
                store(packed + r * P + i, (v - load<A>(shift + d + i)) * weight);
            }
        }
    }
}

// tile += block, where the columns exist.    block: [PANEL, PANEL], tile: [TILE, TILE] float64.
template <class A>
void fold_block(const A* block, double* tile, int64_t rows, int64_t columns) {
    for (int64_t a = 0; a < rows; ++a)
        for (int64_t b = 0; b < columns; ++b) tile[a * TILE + b] += static_cast<double>(block[a * PANEL<A> + b]);
}

// tiles[i, j] += sum_r y_r[128 i ..] y_r[128 j ..]', y = (x - shift) sqrt(w), for the tiles on and under the diagonal.
// rows: [N, D], tiles: [T, TILE, TILE] float64, T = P (P + 1) / 2, P = ceil(D / TILE).
// A accumulates along a chain and along a block of chains, float64 adds the blocks: a tree fixed by row ordinals.
template <class A, class T>
void gram_rows(const Gram& job) {
    constexpr int64_t P = PANEL<A>, STRIPS = TILE / P, CHAIN_PANEL = CHAIN * P, BLOCK = P * P;
    const int64_t N = job.rows.rows, D = job.rows.cols;
    const int64_t panels = ceil_div(D, P), tiles = ceil_div(D, TILE), chains = ceil_div(N, CHAIN);
    const int64_t chain_size = panels * CHAIN_PANEL;
    const int64_t group = least(chains, most(1, PACKED_BYTES / (chain_size * static_cast<int64_t>(sizeof(A)))));
    const int threads = team(job.threads, N * D * ceil_div(D, 32));

    const Scratch shift_memory(panels * P * sizeof(A)), packed_memory(group * chain_size * sizeof(A));
    const Scratch block_memory(panels * (panels + 1) / 2 * BLOCK * sizeof(A));
    A* shift = array<A>(shift_memory);
    A* packed = array<A>(packed_memory);
    A* blocks = array<A>(block_memory);
    for (int64_t d = 0; d < panels * P; ++d) shift[d] = d < D ? static_cast<A>(job.shift[d]) : 0;

    const auto rows_of = [&](int64_t chain) { return least(CHAIN, N - chain * CHAIN); };
    for (int64_t start = 0; start < chains; start += group) {
        const int64_t stop = least(chains, start + group);
        constexpr int64_t PIECES = CHAIN / PACK_ROWS;
        parallel(threads, (stop - start) * PIECES, [&](int, int64_t part) {
            const int64_t chain = start + part / PIECES, row = part % PIECES * PACK_ROWS;
            const int64_t count = least(PACK_ROWS, rows_of(chain) - row);
            A* out = packed + (chain - start) * chain_size + row * P;
            if (count > 0) pack_rows<A, T>(job, shift, chain * CHAIN + row, count, out);
        });
        // A part is one panel of tile row i against the panels of tile column j: consecutive parts share those.
        parallel(threads, tiles * tiles * STRIPS, [&](int, int64_t part) {
            const int64_t i = part / STRIPS / tiles, j = part / STRIPS % tiles, a = i * STRIPS + part % STRIPS;
            if (j > i || a >= panels) return;
            const int64_t b_end = least(a + 1, (j + 1) * STRIPS);
            for (int64_t chain = start; chain < stop; ++chain) {
                const A* chain_packed = packed + (chain - start) * chain_size;
                const bool first = chain % BLOCK_CHAINS == 0;
                const bool last = chain + 1 == chains || (chain + 1) % BLOCK_CHAINS == 0;
                for (int64_t b = j * STRIPS; b < b_end; ++b) {
                    A* block = blocks + (a * (a + 1) / 2 + b) * BLOCK;
                    multiply<A, 1, P>(chain_packed + a * CHAIN_PANEL, P, chain_packed + b * CHAIN_PANEL,
                                      rows_of(chain), block, !first);
                    if (!last) continue;
                    double* tile = job.tiles + (i * (i + 1) / 2 + j) * TILE * TILE;
                    fold_block(block, tile + a % STRIPS * P * TILE + b % STRIPS * P, least(P, D - a * P),
                               least(P, D - b * P));
                }
            }
        });
    }
}

void gram(const Gram& job) {
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
        gram_rows<A, T>(job);
    });
}

}  // namespace
}  // namespace emocore
