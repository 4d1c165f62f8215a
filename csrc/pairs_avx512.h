// The packed product under gram for bfloat16 rows on AVX512_BF16: a line holds a pair of rows.
#pragma once

namespace emocore {
namespace {

// The columns that are not about zero, each of which has a low part in panels past those of all columns.
struct Moved {
    const int32_t* columns;  // [count]
    int64_t count;
    double* sums;  // [panels of count, panels of all and of count] x PANEL columns each: low parts by every part
    int64_t width;
};

// As panel_cpu.h says of a product. y = x - shift is the sum of two bfloat16; where the shift is zero the second is,
// and it is left out.
struct PairProduct {
    using Sum = float;
    static constexpr int64_t ELEMENT = sizeof(BFloat16), PANEL = 16, CHAIN_ROWS = CHAIN, PACK_ROWS = 16;
    static constexpr int64_t PANEL_BYTES = CHAIN_ROWS / 2 * 64, FAR_CHAINS = 4, TURN_TILES = 4;

    Moved moved;

    int64_t more() const { return ceil_div(moved.count, PANEL); }

    // sums += block, from its row and column on.
    void fold_more(const float* block, int64_t row, int64_t column) const {
        for (int64_t r = 0; r < PANEL; ++r)
            for (int64_t c = 0; c < PANEL; ++c)
                moved.sums[(row + r) * moved.width + column + c] += static_cast<double>(block[r * PANEL + c]);
    }

    // packed[panel, line] = 16 columns of two rows, interleaved; zero past D and past the last row.
    void pack(const Rows& x, const double*, const float* shift, int64_t first, int64_t panels, void* packed) const {
        char* lines = static_cast<char*>(packed) + first / 2 * 64;
        const auto each = [&](const auto& line) {
            for (int64_t r = 0; r < x.rows; r += 2) {
                const __m512i odd = r + 1 < x.rows ? line(r + 1) : __m512i{};
                _mm512_store_si512(lines + r * 32, _mm512_or_si512(_mm512_srli_epi32(line(r), 16), odd));
            }
            lines += PANEL_BYTES;
        };
        for (int64_t panel = 0; panel < panels; ++panel) {
            const __m512 s = load<float>(shift + panel * PANEL);
            if (moved.count && _mm512_cmp_ps_mask(s, __m512{}, _CMP_NEQ_UQ))
                each([&](int64_t r) { return split(columns(x, r, panel) - s).high; });
            else
                each([&](int64_t r) { return _mm512_castps_si512(columns(x, r, panel)); });
        }
        for (int64_t panel = 0; panel < more(); ++panel)
            each([&](int64_t r) { return low(x, r, panel, shift); });
    }

    static __m512 columns(const Rows& x, int64_t r, int64_t panel) {
        const BFloat16* row = row_of<const BFloat16>(x, r) + panel * PANEL;
        const int64_t count = x.cols - panel * PANEL;
        return count >= PANEL ? load<float>(row) : load_some<float>(row, count);
    }

    __m512i low(const Rows& x, int64_t r, int64_t panel, const float* shift) const {
        const BFloat16* row = row_of<const BFloat16>(x, r);
        alignas(64) BFloat16 picked[PANEL] = {};
        alignas(64) float about[PANEL] = {};
        for (int64_t i = 0; i < least(PANEL, moved.count - panel * PANEL); ++i) {
            const int64_t d = moved.columns[panel * PANEL + i];
            picked[i] = row[d];
            about[i] = shift[d];
        }
        return split(load<float>(picked) - load<float>(about)).low;
    }

    static void multiply(const void* left, const void* right, int64_t count, int64_t rows, float* blocks,
                         bool add) {
        const char* x = static_cast<const char*>(left);
        const char* y = static_cast<const char*>(right);
        const auto some = [&](auto width, int64_t b) {
            for (int64_t a = 0; a < PANEL; a += 8)
                multiply_strip<width>(x + a * 4, y + b * PANEL_BYTES, ceil_div(rows, 2),
                                      blocks + b * PANEL * PANEL + a * PANEL, add);
        };
        int64_t b = 0;
        for (; b + 3 <= count; b += 3) some(std::integral_constant<int64_t, 3>{}, b);
        if (count - b == 2) some(std::integral_constant<int64_t, 2>{}, b);
        if (count - b == 1) some(std::integral_constant<int64_t, 1>{}, b);
    }

    // block[i, a] (+)= sum over pairs of left[a] . right[i] for 8 columns a and WIDTH panels i.
    template <int64_t WIDTH>
    static void multiply_strip(const char* left, const char* right, int64_t lines, float* block, bool add) {
        __m512 sum[8][WIDTH] = {};
        for (int64_t r = 0; r < lines; ++r) {
            __m512i y[WIDTH];
            for (int64_t i = 0; i < WIDTH; ++i) {
                const char* line = right + i * PANEL_BYTES + r * 64;
                __builtin_prefetch(line + 16 * 64);
                y[i] = _mm512_load_si512(line);
            }
            __builtin_prefetch(left + (r + 16) * 64);
            for (int64_t a = 0; a < 8; ++a) {
                int32_t pair;
                std::memcpy(&pair, left + r * 64 + a * 4, sizeof pair);
                const __m512i x = _mm512_set1_epi32(pair);
                for (int64_t i = 0; i < WIDTH; ++i)
                    sum[a][i] = _mm512_dpbf16_ps(sum[a][i], (__m512bh)x, (__m512bh)y[i]);
            }
        }
        for (int64_t a = 0; a < 8; ++a) {
            for (int64_t i = 0; i < WIDTH; ++i) {
                float* out = block + i * PANEL * PANEL + a * PANEL;
                store(out, add ? load<float>(static_cast<const float*>(out)) + sum[a][i] : sum[a][i]);
            }
        }
    }
};

double peak_of_pairs(const Peak& job) {
    if (job.arithmetic != DType::bfloat16) return peak(job);
    return peak_of(job, [](int64_t turns) {
        const __m512i ones = _mm512_set1_epi32(0x3f803f80);  // two 1 in bfloat16
        __m512 sum[SUMS] = {};
        for (int64_t turn = 0; turn < turns; ++turn)
            for (__m512& one : sum) one = _mm512_dpbf16_ps(one, (__m512bh)ones, (__m512bh)ones);
        for (int64_t i = 1; i < SUMS; ++i) sum[0] = sum[0] + sum[i];
        volatile float kept = total(sum[0]);
        (void)kept;
        return 4.0 * turns * SUMS * LANES<float>;
    });
}

// tiles += what the low parts add: low i by high j to (i, j), low i by low j once for both orders.
void add_low(const Gram& job, const Moved& moved, int64_t lows) {
    const auto add = [&](int64_t i, int64_t j, double sum) {
        const int64_t row = most(i, j), column = least(i, j), a = row / TILE, b = column / TILE;
        job.tiles[((a * (a + 1) / 2 + b) * TILE + row % TILE) * TILE + column % TILE] += sum;
    };
    for (int64_t m = 0; m < moved.count; ++m) {
        const int64_t i = moved.columns[m];
        const double* sums = moved.sums + m * moved.width;
        for (int64_t j = 0; j < job.rows.cols; ++j) add(i, j, i == j ? 2 * sums[j] : sums[j]);
        for (int64_t n = 0; n <= m; ++n) add(i, moved.columns[n], sums[lows + n]);
    }
}

// Rows of which few columns are about another shift than zero, a block at a time: the tree of sums is a block's.
void gram_moved(const Gram& job, const int32_t* columns, int64_t count) {
    constexpr int64_t P = PairProduct::PANEL, BLOCK_ROWS = CHAIN * BLOCK_CHAINS;
    const int64_t lows = ceil_div(job.rows.cols, P) * P, more = ceil_div(count, P) * P, width = lows + more;
    const Scratch sums_memory(more * width * sizeof(double));
    const Moved moved{columns, count, array<double>(sums_memory), width};
    for (int64_t first = 0; first < job.rows.rows; first += BLOCK_ROWS) {
        Gram block = job;
        block.rows.data = const_cast<BFloat16*>(row_of<const BFloat16>(job.rows, first));
        block.rows.rows = least(BLOCK_ROWS, job.rows.rows - first);
        std::memset(moved.sums, 0, more * width * sizeof(double));
        GramRun<PairProduct>(block, {moved}).run();
        add_low(block, moved, lows);
    }
}

// With more low parts float32 is as fast; weights, and shifts of many bits, do not fit in two parts.
void gram_bfloat16(const Gram& job) {
    const int64_t D = job.rows.cols;
    const Scratch columns_memory(D * sizeof(int32_t));
    int32_t* columns = array<int32_t>(columns_memory);
    int64_t count = 0;
    for (int64_t d = 0; d < D; ++d)
        if (job.shift[d] != 0) columns[count++] = static_cast<int32_t>(d);
    if (count * 5 > D || !as_parts(job))
        gram(job);
    else if (count)
        gram_moved(job, columns, count);
    else
        GramRun<PairProduct>(job).run();
}

}  // namespace
}  // namespace emocore
