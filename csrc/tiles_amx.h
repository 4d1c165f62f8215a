// The packed product under gram for bfloat16 rows on AMX: a tile register holds 16 columns of 32 rows.
#pragma once

namespace emocore {
namespace {

// All eight tiles are 16 lines of 64 bytes.
alignas(64) constexpr uint8_t TILE_SHAPES[64] = {1,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                                 64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,
                                                 0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                                 16, 16, 16, 16, 16, 16, 16, 16, 0,  0,  0,  0,  0,  0,  0,  0};

// Lines become columns.    x: [16, 16] of 32 bits.
inline void transpose(__m512i* x) {
    __m512i y[16];
    for (int64_t i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
        const __m512i d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c);
        y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d);
        y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int64_t i = 0; i < 4; ++i) {
        const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
        x[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// As panel_cpu.h says of a product. A step is 32 rows; a panel keeps its tiles as [part][side][step][half]: on the
// left a tile has a line a column, on the right a line a pair of rows.
struct TileProduct {
    using Sum = float;
    static constexpr int64_t ELEMENT = sizeof(BFloat16), PANEL = 32, CHAIN_ROWS = 512, PACK_ROWS = 32;
    static constexpr int64_t STEPS = CHAIN_ROWS / PACK_ROWS;
    static constexpr int64_t TILE_BYTES = 1024, STEP_BYTES = 2 * TILE_BYTES, SIDE_BYTES = STEPS * STEP_BYTES;
    static constexpr int64_t PART_BYTES = 2 * SIDE_BYTES, FLAGS = 2 * PART_BYTES;
    static constexpr int64_t PANEL_BYTES = FLAGS + 64;  // a byte a step: whether there are low parts
    static constexpr int64_t FAR_CHAINS = 1, TURN_TILES = 8;

    static constexpr int64_t more() { return 0; }
    static void fold_more(const float*, int64_t, int64_t) {}

    static void pack(const Rows& x, const double*, const float* shift, int64_t first, int64_t panels,
                     void* packed) {
        const int64_t step = first / PACK_ROWS;
        char* panel = static_cast<char*>(packed);
        for (int64_t p = 0; p < panels; ++p, shift += PANEL, panel += PANEL_BYTES) {
            const bool moved[2] = {is_moved(shift), is_moved(shift + 16)};
            bool low = false;
            for (int64_t half = 0; half < 2; ++half) {
                char* tile = panel + step * STEP_BYTES + half * TILE_BYTES;
                const int64_t d = p * PANEL + half * 16;
                if (moved[half])
                    low |= pack_moved(x, d, shift + half * 16, tile);
                else
                    pack_whole(x, d, moved[1 - half], tile);
            }
            panel[FLAGS + step] = low;
        }
    }

    static bool is_moved(const float* shift) {
        return _mm512_cmp_ps_mask(_mm512_loadu_ps(shift), _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
    }

    // 16 columns of row r from column d, bits in the upper halves; zeros past both ends.
    static __m512 columns(const Rows& x, int64_t r, int64_t d) {
        if (r >= x.rows || d >= x.cols) return __m512{};
        const BFloat16* row = row_of<const BFloat16>(x, r) + d;
        return x.cols - d >= 16 ? load<float>(row) : load_some<float>(row, x.cols - d);
    }

    static __m512i paired(__m512i even, __m512i odd) {
        return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
    }

    // 16 columns about zero; low parts are zeros, read where the other half of the panel has some.
    static void pack_whole(const Rows& x, int64_t d, bool low, char* tile) {
        __m512i lines[16];
        for (int64_t p = 0; p < 16; ++p)
            lines[p] = paired(_mm512_castps_si512(columns(x, 2 * p, d)),
                              _mm512_castps_si512(columns(x, 2 * p + 1, d)));
        keep(lines, tile);
        if (!low) return;
        std::memset(tile + PART_BYTES, 0, TILE_BYTES);
        std::memset(tile + PART_BYTES + SIDE_BYTES, 0, TILE_BYTES);
    }

    // 16 columns about others, in both parts; whether any low one is not zero.
    static bool pack_moved(const Rows& x, int64_t d, const float* shift, char* tile) {
        const __m512 s = _mm512_loadu_ps(shift);
        const auto parts = [&](int64_t r) { return r < x.rows ? split(columns(x, r, d) - s) : Parts{}; };
        __m512i high[16], low[16], any{};
        for (int64_t p = 0; p < 16; ++p) {
            const Parts even = parts(2 * p), odd = parts(2 * p + 1);
            high[p] = paired(even.high, odd.high);
            low[p] = paired(even.low, odd.low);
            any = _mm512_or_si512(any, low[p]);
        }
        keep(high, tile);
        keep(low, tile + PART_BYTES);
        return _mm512_test_epi32_mask(any, _mm512_set1_epi32(0x7fff7fff)) != 0;
    }

    static void keep(__m512i* lines, char* tile) {
        for (int64_t p = 0; p < 16; ++p) _mm512_store_si512(tile + SIDE_BYTES + p * 64, lines[p]);
        transpose(lines);
        for (int64_t p = 0; p < 16; ++p) _mm512_store_si512(tile + p * 64, lines[p]);
    }

    static void multiply(const void* left, const void* right, int64_t count, int64_t rows, float* blocks,
                         bool add) {
        const int64_t steps = ceil_div(rows, PACK_ROWS);
        _tile_loadconfig(TILE_SHAPES);
        for (int64_t b = 0; b < count; ++b)
            multiply_panels(static_cast<const char*>(left), static_cast<const char*>(right) + b * PANEL_BYTES,
                            steps, blocks + b * PANEL * PANEL, add);
        _tile_release();
    }

    // block (+)= left' right, the four products of high and low parts where there are low ones.
    static void multiply_panels(const char* left, const char* right, int64_t steps, float* block, bool add) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < steps; ++step) {
            const bool left_low = left[FLAGS + step], right_low = right[FLAGS + step];
            const char* x = left + step * STEP_BYTES;
            const char* y = right + step * STEP_BYTES + SIDE_BYTES;
            load_left(x);
            load_right(y);
            add_products();
            if (right_low) {
                load_right(y + PART_BYTES);
                add_products();
            }
            if (left_low) {
                load_left(x + PART_BYTES);
                if (right_low) {
                    add_products();
                    load_right(y);
                }
                add_products();
            }
        }
        if (!add) return store_sums(block);
        alignas(64) float sums[PANEL * PANEL];
        store_sums(sums);
        for (int64_t i = 0; i < PANEL * PANEL; i += 16)
            _mm512_storeu_ps(block + i, _mm512_loadu_ps(block + i) + _mm512_load_ps(sums + i));
    }

    static void store_sums(float* block) {
        constexpr int64_t LINE = PANEL * sizeof(float), DOWN = 16 * PANEL;
        _tile_stored(0, block, LINE);
        _tile_stored(1, block + 16, LINE);
        _tile_stored(2, block + DOWN, LINE);
        _tile_stored(3, block + DOWN + 16, LINE);
    }

    static void load_left(const char* tiles) {
        _tile_loadd(4, tiles, 64);
        _tile_loadd(5, tiles + TILE_BYTES, 64);
    }

    static void load_right(const char* tiles) {
        _tile_loadd(6, tiles, 64);
        _tile_loadd(7, tiles + TILE_BYTES, 64);
    }

    static void add_products() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

double peak_of_tiles(const Peak& job) {
    if (job.arithmetic != DType::bfloat16) return peak(job);
    return peak_of(job, [](int64_t turns) {
        alignas(64) constexpr char zeros[2 * TileProduct::TILE_BYTES] = {};
        _tile_loadconfig(TILE_SHAPES);
        TileProduct::load_left(zeros);
        TileProduct::load_right(zeros);
        for (int64_t turn = 0; turn < turns; ++turn) TileProduct::add_products();
        _tile_release();
        return turns * 4 * 2.0 * 16 * 16 * TileProduct::PACK_ROWS;
    });
}

// Rows about another shift, and weighted ones, are multiplied in float32.
void gram_bfloat16(const Gram& job) {
    if (as_parts(job))
        GramRun<TileProduct>(job).run();
    else
        gram(job);
}

}  // namespace
}  // namespace emocore
