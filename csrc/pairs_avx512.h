// The packed product under gram for bfloat16 rows about zero on AVX512_BF16: a line holds a pair of rows.
#pragma once

namespace emocore {
namespace {

// As panel_cpu.h says of a product; rows are multiplied as they come, so the shift must be zero.
struct PairProduct {
    using Sum = float;
    static constexpr int64_t ELEMENT = sizeof(BFloat16), PANEL = 16, CHAIN_ROWS = CHAIN, PACK_ROWS = 16;
    static constexpr int64_t PANEL_BYTES = CHAIN_ROWS / 2 * 64, FAR_CHAINS = 4, TURN_TILES = 4;

    // packed[panel, line] = 16 columns of two rows, interleaved; zero past D and past the last row.
    static void pack(const Rows& x, const double*, const float*, int64_t first, int64_t panels, void* packed) {
        char* lines = static_cast<char*>(packed) + first / 2 * 64;
        for (int64_t panel = 0; panel < panels; ++panel, lines += PANEL_BYTES)
            for (int64_t r = 0; r < x.rows; r += 2)
                _mm512_store_si512(lines + r * 32, _mm512_or_si512(_mm512_srli_epi32(line(x, r, panel), 16),
                                                                   line(x, r + 1, panel)));
    }

    // Columns of a row in the upper halves.
    static __m512i line(const Rows& x, int64_t r, int64_t panel) {
        if (r >= x.rows) return __m512i{};
        const BFloat16* row = row_of<const BFloat16>(x, r) + panel * PANEL;
        const int64_t count = x.cols - panel * PANEL;
        return _mm512_castps_si512(count >= PANEL ? load<float>(row) : load_some<float>(row, count));
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

bool about_zero(const Gram& job) {
    for (int64_t d = 0; d < job.rows.cols; ++d)
        if (job.shift[d] != 0) return false;
    return true;
}

// y = x - shift would need more bits than a bfloat16 has, and its rounding shows: by up to 1e-4 of a variance
// over 20,000 rows. Rows about another shift, and weighted ones, are multiplied in float32.
void gram_bfloat16(const Gram& job) {
    if (job.rows.dtype == DType::bfloat16 && !job.weights && about_zero(job))
        GramRun<PairProduct>(job).run();
    else
        gram(job);
}

}  // namespace
}  // namespace emocore
