// AVX-512 (F, BW, DQ, VL) + F16C: 16 lanes of float, 8 of double.
#pragma once

namespace emocore {
namespace {

constexpr int64_t REGISTERS = 32;

template <class A>
struct Register;
template <>
struct Register<float> {
    using Type = __m512;
};
template <>
struct Register<double> {
    using Type = __m512d;
};

template <class A>
using Vector = typename Register<A>::Type;

template <class A>
constexpr int64_t LANES = 64 / sizeof(A);

// load<A>(x): the next LANES<A> elements at x, widened to A.
template <class A, class T>
Vector<A> load(const T* x);
template <>
inline __m512 load<float>(const float* x) {
    return _mm512_loadu_ps(x);
}
template <>
inline __m512d load<double>(const double* x) {
    return _mm512_loadu_pd(x);
}
template <>
inline __m512d load<double>(const float* x) {
    return _mm512_cvtps_pd(_mm256_loadu_ps(x));
}
template <>
inline __m512 load<float>(const BFloat16* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
template <>
inline __m512d load<double>(const BFloat16* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
}
template <>
inline __m512 load<float>(const Float16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
template <>
inline __m512d load<double>(const Float16* x) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

inline void store(double* out, __m512d x) { _mm512_storeu_pd(out, x); }
inline void store(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
inline void store(float* out, __m512d x) { _mm256_storeu_ps(out, _mm512_cvtpd_ps(x)); }

// The upper halves hold x as bfloat16, rounded to nearest even; not for NaNs.
inline __m512i rounded(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

// Round to nearest even; a NaN stays one.
inline __m256i narrowed(__m512 x) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_set1_epi32(0x400000);
    const __m512i kept = _mm512_mask_or_epi32(rounded(x), is_nan, _mm512_castps_si512(x), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
inline void store(BFloat16* out, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrowed(x));
}
inline void store(Float16* out, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

template <class A>
inline Vector<A> broadcast(A x);
template <>
inline __m512 broadcast(float x) {
    return _mm512_set1_ps(x);
}
template <>
inline __m512d broadcast(double x) {
    return _mm512_set1_pd(x);
}

inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }

// The lanes summed, in one order.
inline double total(__m512d x) {
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1));
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}
inline float total(__m512 x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Four vectors of four quarters each, as a matrix of quarters: x[i] holds quarter i of every vector.
inline void turn_quarters(__m512& a, __m512& b, __m512& c, __m512& d) {
    const __m512 ab_even = _mm512_shuffle_f32x4(a, b, 0x88), ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
    const __m512 cd_even = _mm512_shuffle_f32x4(c, d, 0x88), cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
    a = _mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
    b = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    c = _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
    d = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
}

// Rows become columns.
inline void transpose(__m512 (&x)[16]) {
    __m512d pairs[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1]));
        pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i], pairs[i + 2]));
        x[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i], pairs[i + 2]));
        x[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i + 1], pairs[i + 3]));
        x[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i + 1], pairs[i + 3]));
    }
    for (int i = 0; i < 4; ++i) turn_quarters(x[i], x[4 + i], x[8 + i], x[12 + i]);
}
inline void transpose(__m512d (&x)[8]) {
    __m512 pairs[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x[i], x[i + 1]));
        pairs[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x[i], x[i + 1]));
    }
    for (int i = 0; i < 2; ++i) turn_quarters(pairs[i], pairs[2 + i], pairs[4 + i], pairs[6 + i]);
    for (int i = 0; i < 8; ++i) x[i] = _mm512_castps_pd(pairs[i]);
}

}  // namespace
}  // namespace emocore
