// The vector of a machine about which nothing is known: one lane.
#pragma once

namespace emocore {
namespace {

constexpr int64_t REGISTERS = 16;

template <class A>
using Vector = A;

template <class A>
constexpr int64_t LANES = 1;

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// A subnormal is a count of 2^-24; the others have their exponent moved, infinities and NaNs to the top.
inline float widen(Float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, size = x.bits & 0x7fffu;
    const uint32_t moved = (size << 13) + ((size < 0x7c00 ? 112u : 224u) << 23);
    return float_of(sign | (size < 0x400 ? bits_of(static_cast<float>(size) * 0x1p-24f) : moved));
}

template <class A, class T>
inline A load(const T* x) {
    if constexpr (std::is_class_v<T>)
        return widen(*x);
    else
        return static_cast<A>(*x);
}

inline void store(double* out, double x) { *out = x; }
inline void store(float* out, float x) { *out = x; }
inline void store(float* out, double x) { *out = static_cast<float>(x); }

// Round to nearest even; a NaN stays one.
inline void store(BFloat16* out, float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    out->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16);
}
inline void store(Float16* out, float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000, size = bits_of(x) & 0x7fffffff;
    uint32_t bits;
    if (x != x)
        bits = 0x7e00 | (size >> 13 & 0x3ff);
    else if (size >= 0x477ff000)  // halfway from the largest to the next power of two
        bits = 0x7c00;
    else if (size < 0x38800000)  // subnormal: beside 0.5, a unit of the last place is 2^-24
        bits = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    else
        bits = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    out->bits = static_cast<uint16_t>(sign | bits);
}

template <class A>
inline A broadcast(A x) {
    return x;
}

// One rounding where the hardware has it; a library call would cost more than all the rest.
inline float fma(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
inline double fma(double a, double b, double c) {
#ifdef __FP_FAST_FMA
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

inline float total(float x) { return x; }
inline double total(double x) { return x; }

// Rows become columns.
template <class A>
void transpose(A (&)[1]) {}

}  // namespace
}  // namespace emocore
