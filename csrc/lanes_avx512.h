// Ragged ends by masks: what lanes_cpu.h does through memory.
#pragma once

namespace emocore {
namespace {

// The first `count` < 32 lanes.
inline uint32_t first_lanes(int64_t count) { return (1u << count) - 1; }

inline __m512 widened(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <>
inline __m512 load_some<float>(const float* x, int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), x);
}
template <>
inline __m512 load_some<float>(const BFloat16* x, int64_t count) {
    return widened(_mm256_maskz_loadu_epi16(first_lanes(count), x));
}
template <>
inline __m512d load_some<double>(const double* x, int64_t count) {
    return _mm512_maskz_loadu_pd(first_lanes(count), x);
}
template <>
inline __m512d load_some<double>(const float* x, int64_t count) {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first_lanes(count), x));
}
template <>
inline __m512d load_some<double>(const BFloat16* x, int64_t count) {
    return _mm512_cvtps_pd(_mm512_castps512_ps256(
        widened(_mm256_castsi128_si256(_mm_maskz_loadu_epi16(first_lanes(count), x)))));
}
template <>
inline __m512 load_some<float>(const Float16* x, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), x));
}
template <>
inline __m512d load_some<double>(const Float16* x, int64_t count) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_maskz_loadu_epi16(first_lanes(count), x)));
}

template <>
inline void store_some<float>(float* out, int64_t count, __m512 x) {
    _mm512_mask_storeu_ps(out, first_lanes(count), x);
}
template <>
inline void store_some<double>(double* out, int64_t count, __m512d x) {
    _mm512_mask_storeu_pd(out, first_lanes(count), x);
}
template <>
inline void store_some<float>(BFloat16* out, int64_t count, __m512 x) {
    _mm256_mask_storeu_epi16(out, first_lanes(count), narrowed(x));
}
template <>
inline void store_some<float>(Float16* out, int64_t count, __m512 x) {
    _mm256_mask_storeu_epi16(out, first_lanes(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace emocore
