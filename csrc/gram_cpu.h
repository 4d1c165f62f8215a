// Sums of outer products into packed tiles: the second moment.
#pragma once

namespace emocore {
namespace {

// Packed rows that are multiplied before the next are packed: they should stay near in cache.
constexpr int64_t PACKED_BYTES = 2 << 20;

// Rows that one thread packs at a time.
constexpr int64_t PACK_ROWS = 16;

// tiles[i, j] += sum_r y_r[128 i ..] y_r[128 j ..]', y = (x - shift) sqrt(w), for j <= i.
// rows: [N, D], tiles: [T, TILE, TILE] float64, T = P (P + 1) / 2, P = ceil(D / TILE).
// A accumulates along a chain of rows and along a block of chains, float64 adds the blocks. This tree is
// fixed by the ordinals of the rows: no thread count changes a bit.
template <class A, class T>
class GramRun {
  public:
    explicit GramRun(const Gram& job)
        : job_(job),
          threads_(team(job.threads, job.rows.rows * D * ceil_div(D, 32))),
          shift_memory_(panels * P * sizeof(A)),
          packed_memory_(group * chain_size * sizeof(A)),
          block_memory_(group < chains ? panels * (panels + 1) / 2 * BLOCK * sizeof(A) : 0) {
        A* shift = array<A>(shift_memory_);
        for (int64_t d = 0; d < panels * P; ++d) shift[d] = d < D ? static_cast<A>(job.shift[d]) : 0;
    }

    void run() {
        // A round packs a group of chains in pieces, then multiplies it in strips.
        constexpr int64_t PIECES = CHAIN / PACK_ROWS;
        const int64_t packs = group * PIECES, round = packs + tiles * tiles * STRIPS;
        const auto after = [&](int64_t part) {
            return part - part % round + (part % round < packs ? 0 : packs);
        };
        parallel(threads_, ceil_div(chains, group) * round, after, [&](int, int64_t part) {
            const int64_t start = part / round * group, stop = least(chains, start + group);
            const int64_t piece = part % round, strip = piece - packs;
            if (piece >= packs)
                multiply_strip(strip / STRIPS / tiles, strip / STRIPS % tiles, strip % STRIPS, start, stop);
            else if (start + piece / PIECES < stop)
                pack(start + piece / PIECES, piece % PIECES * PACK_ROWS, piece / PIECES);
        });
    }

  private:
    static constexpr int64_t P = PANEL<A>, STRIPS = TILE / P, BLOCK = P * P, CHAIN_PANEL = CHAIN * P;

    int64_t rows_of(int64_t chain) const { return least(CHAIN, N - chain * CHAIN); }
    A* packed(int64_t slot, int64_t panel) const {
        return array<A>(packed_memory_) + slot * chain_size + panel * CHAIN_PANEL;
    }

    // y of up to PACK_ROWS rows of a chain, from its row `first`.
    // packed: [panels, CHAIN, PANEL], zero past D.
    void pack(int64_t chain, int64_t first, int64_t slot) const {
        const int64_t count = least(PACK_ROWS, rows_of(chain) - first), row = chain * CHAIN + first;
        A root[PACK_ROWS];
        for (int64_t r = 0; r < count; ++r)
            root[r] = static_cast<A>(job_.weights ? std::sqrt(job_.weights[row + r]) : 1.0);
        // Few rows at a time through every panel: reads are streams, writes are whole lines.
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t r = 0; r < count; ++r)
                pack_line(row_of<const T>(job_.rows, row + r), panel * P, root[r],
                          packed(slot, panel) + (first + r) * P);
    }

    void pack_line(const T* x, int64_t first, A root, A* line) const {
        constexpr int64_t L = LANES<A>;
        const A* shift = array<A>(shift_memory_);
        for (int64_t i = 0, d = first; i < P; i += L, d += L) {
            const Vector<A> v = d + L <= D ? load<A>(x + d) : load_some<A>(x + d, most(0, D - d));
            store(line + i, (v - load<A>(shift + d)) * broadcast(root));
        }
    }

    // One panel of tile row i against the panels of tile column j, which consecutive strips share.
    void multiply_strip(int64_t i, int64_t j, int64_t strip, int64_t start, int64_t stop) const {
        const int64_t a = i * STRIPS + strip, first = j * STRIPS, last = least(a + 1, first + STRIPS);
        if (j > i || a >= panels) return;
        A own[STRIPS * BLOCK];
        // A block of chains that the next group continues is kept between the groups.
        A* blocks = group < chains ? array<A>(block_memory_) + (a * (a + 1) / 2 + first) * BLOCK : own;
        for (int64_t chain = start; chain < stop; ++chain) {
            const bool opens = chain % BLOCK_CHAINS == 0;
            const bool closes = chain + 1 == chains || (chain + 1) % BLOCK_CHAINS == 0;
            for (int64_t b = first; b < last; ++b) {
                A* block = blocks + (b - first) * BLOCK;
                multiply(packed(chain - start, a), packed(chain - start, b), rows_of(chain), block, !opens);
                if (closes) fold(block, job_.tiles + (i * (i + 1) / 2 + j) * TILE * TILE, a, b);
            }
        }
    }

    // tile += block where the columns exist.    block: [PANEL, PANEL], tile: [TILE, TILE] float64.
    void fold(const A* block, double* tile, int64_t a, int64_t b) const {
        const int64_t rows = least(P, D - a * P), columns = least(P, D - b * P);
        double* corner = tile + a % STRIPS * P * TILE + b % STRIPS * P;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c)
                corner[r * TILE + c] += static_cast<double>(block[r * P + c]);
    }

    const Gram& job_;
    const int64_t N = job_.rows.rows, D = job_.rows.cols;
    const int64_t panels = ceil_div(D, P), tiles = ceil_div(D, TILE), chains = ceil_div(N, CHAIN);
    const int64_t chain_size = panels * CHAIN_PANEL;
    const int64_t group = most(1, least(chains, PACKED_BYTES / static_cast<int64_t>(chain_size * sizeof(A))));
    const int threads_;
    const Scratch shift_memory_, packed_memory_, block_memory_;
};

void gram(const Gram& job) {
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
        GramRun<A, T>(job).run();
    });
}

}  // namespace
}  // namespace emocore
