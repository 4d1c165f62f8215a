// Numbers of more bits than a bfloat16 has, as the sum of two.
#pragma once

namespace emocore {
namespace {

// y = x - shift to 16 bits as the sum of two bfloat16, high and low, so that no rounding of y is left to show. A
// column about zero is its own high part. Bits in the upper halves, zero below.
struct Parts {
    __m512i high, low;
};

inline Parts split(__m512 y) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512i high = _mm512_and_si512(rounded(y), upper);
    return {high, _mm512_and_si512(rounded(y - _mm512_castsi512_ps(high)), upper)};
}

// Whether x - s keeps to 16 bits, all but the smallest: s is written in few itself, as those that freeze are.
inline bool is_short(double s) {
    constexpr uint32_t BEYOND = 0xfff;  // of the 24 bits of a float, those past the first 12
    const float narrow = static_cast<float>(s);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    return narrow == s && !(bits & BEYOND);
}

// Whether the rows of a job can be multiplied as bfloat16: they are, they have no weights, every shift is short.
inline bool as_parts(const Gram& job) {
    bool fits = job.rows.dtype == DType::bfloat16 && !job.weights;
    for (int64_t d = 0; fits && d < job.rows.cols; ++d) fits = is_short(job.shift[d]);
    return fits;
}

}  // namespace
}  // namespace emocore
