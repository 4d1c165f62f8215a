// What the kernels share above one vector: ragged ends, element types, memory.
#pragma once

namespace emocore {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The first `count` < LANES elements at x; the lanes past them are zero.
template <class A, class T>
Vector<A> load_some(const T* x, int64_t count) {
    T padded[LANES<A>] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = x[i];
    return load<A>(static_cast<const T*>(padded));
}

template <class A, class T>
void store_some(T* out, int64_t count, Vector<A> x) {
    T padded[LANES<A>];
    store(padded, x);
    std::memcpy(out, padded, count * sizeof(T));
}

template <class T>
T* row_of(const Rows& matrix, int64_t row) {
    return static_cast<T*>(matrix.data) + row * matrix.stride;
}

// body(element) with an element of the type of the rows.
template <class Body>
void with_element(DType dtype, const Body& body) {
    if (dtype == DType::float64)
        body(double{});
    else if (dtype == DType::float32)
        body(float{});
    else if (dtype == DType::bfloat16)
        body(BFloat16{});
    else
        body(Float16{});
}

template <class A>
A* array(const Scratch& scratch) {
    return static_cast<A*>(scratch.data());
}

// Rows that a thread takes at a time: enough to pay for the hand-out, few enough to share evenly.
inline int64_t rows_per_part(int64_t row_bytes) { return most(1, 65536 / row_bytes); }

}  // namespace
}  // namespace emocore
