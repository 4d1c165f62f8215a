// AVX2 + FMA + F16C: 8 lanes of float, 4 of double.
#pragma once

namespace emocore {
namespace {

constexpr int64_t REGISTERS = 16;

template <class A>
struct Register;
template <>
struct Register<float> {
    using Type = __m256;
};
template <>
struct Register<double> {
    using Type = __m256d;
};

template <class A>
using Vector = typename Register<A>::Type;

template <class A>
constexpr int64_t LANES = 32 / sizeof(A);

// load<A>(x): the next LANES<A> elements at x, widened to A.
template <class A, class T>
Vector<A> load(const T* x);
template <>
inline __m256 load<float>(const float* x) {
    return _mm256_loadu_ps(x);
}
template <>
inline __m256d load<double>(const double* x) {
    return _mm256_loadu_pd(x);
}
template <>
inline __m256d load<double>(const float* x) {
    return _mm256_cvtps_pd(_mm_loadu_ps(x));
}
template <>
inline __m256 load<float>(const BFloat16* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
template <>
inline __m256d load<double>(const BFloat16* x) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16)));
}
template <>
inline __m256 load<float>(const Float16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
template <>
inline __m256d load<double>(const Float16* x) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}

inline void store(double* out, __m256d x) { _mm256_storeu_pd(out, x); }
inline void store(float* out, __m256 x) { _mm256_storeu_ps(out, x); }
inline void store(float* out, __m256d x) { _mm_storeu_ps(out, _mm256_cvtpd_ps(x)); }

// Round to nearest even; a NaN stays one.
inline void store(BFloat16* out, __m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}
inline void store(Float16* out, __m256 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

template <class A>
inline Vector<A> broadcast(A x);
template <>
inline __m256 broadcast(float x) {
    return _mm256_set1_ps(x);
}
template <>
inline __m256d broadcast(double x) {
    return _mm256_set1_pd(x);
}

inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }

// The lanes summed, in one order.
inline float total(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline double total(__m256d x) {
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}

// Rows become columns.
inline void transpose(__m256 (&x)[8]) {
    __m256d pairs[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_castps_pd(_mm256_unpacklo_ps(x[i], x[i + 1]));
        pairs[i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(x[i], x[i + 1]));
    }
    __m256 fours[8];
    for (int i = 0; i < 8; i += 4) {
        fours[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(pairs[i], pairs[i + 2]));
        fours[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(pairs[i], pairs[i + 2]));
        fours[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(pairs[i + 1], pairs[i + 3]));
        fours[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(pairs[i + 1], pairs[i + 3]));
    }
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
        x[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
}
inline void transpose(__m256d (&x)[4]) {
    __m256d pairs[4];
    for (int i = 0; i < 4; i += 2) {
        pairs[i] = _mm256_unpacklo_pd(x[i], x[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_pd(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        x[i] = _mm256_permute2f128_pd(pairs[i], pairs[2 + i], 0x20);
        x[2 + i] = _mm256_permute2f128_pd(pairs[i], pairs[2 + i], 0x31);
    }
}

}  // namespace
}  // namespace emocore
