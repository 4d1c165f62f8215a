// The vector of a machine about which nothing is known: one lane.
#pragma once

namespace emocore {
namespace {

constexpr int64_t REGISTERS = 16;

template <class A>
using Vector = A;

template <class A>
constexpr int64_t LANES = 1;

inline float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class A, class T>
inline A load(const T* x) {
    if constexpr (sizeof(T) == sizeof(BFloat16))
        return widen(*x);
    else
        return static_cast<A>(*x);
}

inline void store(double* out, double x) { *out = x; }
inline void store(float* out, float x) { *out = x; }

// Round to nearest even; a NaN stays one.
inline void store(BFloat16* out, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    out->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16);
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

}  // namespace
}  // namespace emocore
