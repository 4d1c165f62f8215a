// Sums of outer products into packed tiles: the second moment.
#pragma once

namespace emocore {
namespace {

// Packed chains that are multiplied before the next are packed should stay near in cache.
constexpr int64_t PACKED_BYTES = 1 << 20;

// tiles[i, j] += sum_r y_r[128 i ..] y_r[128 j ..]', y = (x - shift) sqrt(w), for j <= i.
// rows: [N, D], tiles: [T, TILE, TILE] float64, T = P (P + 1) / 2, P = ceil(D / TILE).
// Product::Sum accumulates along a chain of rows and along a block of chains, float64 adds the blocks. This tree
// is fixed by the ordinals of the rows: no thread count changes a bit.
template <class Product>
class GramRun {
    using A = typename Product::Sum;

  public:
    explicit GramRun(const Gram& job, const Product& product = {})
        : job_(job),
          product_(product),
          threads_(team(job.threads, job.rows.rows * D * ceil_div(D, 32))),
          shift_memory_(panels * P * sizeof(A)),
          packed_memory_(group * chain_bytes),
          block_memory_(group < chains ? panels * (panels + 1) / 2 * BLOCK * sizeof(A) : 0) {
        A* shift = array<A>(shift_memory_);
        for (int64_t d = 0; d < panels * P; ++d) shift[d] = d < D ? static_cast<A>(job.shift[d]) : 0;
    }

    void run() {
        // A round packs a group of chains in pieces, then multiplies it in strips.
        constexpr int64_t PIECES = CHAIN_ROWS / Product::PACK_ROWS, TURN = Product::TURN_TILES * STRIPS;
        const int64_t packs = group * PIECES, round = packs + ceil_div(tiles, Product::TURN_TILES) * tiles * TURN;
        const auto after = [&](int64_t part) {
            return part - part % round + (part % round < packs ? 0 : packs);
        };
        parallel(threads_, ceil_div(chains, group) * round, after, [&](int, int64_t part) {
            const int64_t start = part / round * group, stop = least(chains, start + group);
            const int64_t piece = part % round, strip = piece - packs;
            if (piece >= packs)
                multiply(strip / TURN / tiles * TURN + strip % TURN, strip / TURN % tiles, start, stop);
            else if (start + piece / PIECES < stop)
                pack(start + piece / PIECES, piece % PIECES * Product::PACK_ROWS, piece / PIECES);
        });
    }

  private:
    static constexpr int64_t P = Product::PANEL, STRIPS = TILE / P, BLOCK = P * P;
    static constexpr int64_t CHAIN_ROWS = Product::CHAIN_ROWS, CHAINS = CHAIN * BLOCK_CHAINS / CHAIN_ROWS;

    int64_t rows_of(int64_t chain) const { return least(CHAIN_ROWS, N - chain * CHAIN_ROWS); }
    char* packed(int64_t slot, int64_t panel) const {
        return array<char>(packed_memory_) + slot * chain_bytes + panel * Product::PANEL_BYTES;
    }

    // Up to PACK_ROWS rows of a chain, from its row `first`.
    void pack(int64_t chain, int64_t first, int64_t slot) const {
        const int64_t row = chain * CHAIN_ROWS + first;
        Rows x = job_.rows;
        x.rows = least(Product::PACK_ROWS, rows_of(chain) - first);
        if (x.rows <= 0) return;
        x.data = static_cast<char*>(x.data) + row * x.stride * Product::ELEMENT;
        const double* weights = job_.weights ? job_.weights + row : nullptr;
        product_.pack(x, weights, array<A>(shift_memory_), first, whole, packed(slot, 0));
    }

    // Panel a against the panels of tile column j.
    void multiply(int64_t a, int64_t j, int64_t start, int64_t stop) const {
        const int64_t i = a / STRIPS, first = j * STRIPS, last = least(a + 1, first + STRIPS);
        if (j > i || a >= panels) return;
        A own[STRIPS * BLOCK];
        // A block of chains that the next group continues is kept between the groups.
        A* blocks = group < chains ? array<A>(block_memory_) + (a * (a + 1) / 2 + first) * BLOCK : own;
        for (int64_t chain = start; chain < stop; ++chain) {
            const bool opens = chain % CHAINS == 0;
            const bool closes = chain + 1 == chains || (chain + 1) % CHAINS == 0;
            Product::multiply(packed(chain - start, a), packed(chain - start, first), last - first,
                              rows_of(chain), blocks, !opens);
            for (int64_t b = first; closes && b < last; ++b)
                fold(blocks + (b - first) * BLOCK, job_.tiles + (i * (i + 1) / 2 + j) * TILE * TILE, a, b);
        }
    }

    // tile += block where the columns exist.    block: [PANEL, PANEL], tile: [TILE, TILE] float64.
    void fold(const A* block, double* tile, int64_t a, int64_t b) const {
        if (a >= whole) return product_.fold_more(block, (a - whole) * P, b * P);
        const int64_t rows = least(P, D - a * P), columns = least(P, D - b * P);
        double* corner = tile + a % STRIPS * P * TILE + b % STRIPS * P;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c)
                corner[r * TILE + c] += static_cast<double>(block[r * P + c]);
    }

    const Gram& job_;
    const Product product_;
    const int64_t N = job_.rows.rows, D = job_.rows.cols;
    const int64_t whole = ceil_div(D, P), panels = whole + product_.more();  // past the whole: what a product adds
    const int64_t tiles = ceil_div(panels, STRIPS), chains = ceil_div(N, CHAIN_ROWS);
    const int64_t chain_bytes = panels * Product::PANEL_BYTES;
    const int64_t group =
        least(most(1, chains), chain_bytes > PACKED_BYTES ? Product::FAR_CHAINS : PACKED_BYTES / chain_bytes);
    const int threads_;
    const Scratch shift_memory_, packed_memory_, block_memory_;
};

void gram(const Gram& job) {
    with_element(job.rows.dtype, [&](auto element) {
        using T = decltype(element);
        using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
        GramRun<LineProduct<A, T>>(job).run();
    });
}

}  // namespace
}  // namespace emocore
