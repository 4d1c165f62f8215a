// Checks of the arguments, before any memory is touched: std::invalid_argument is ValueError,
// std::out_of_range is IndexError.
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "rows.h"

namespace emocore {

// An array as the caller named it.
struct Array {
    std::string name;  // "stage: out"
    Rows view;
    bool writable = true;
};

int64_t element_size(DType dtype);
const char* dtype_name(DType dtype);
DType dtype_named(const std::string& name, const std::string& argument);

// Throws unless the array is [rows, cols] of one of the dtypes; a 1-D array is one row.
Rows expect(const Array& array, std::initializer_list<DType> dtypes, int64_t rows, int64_t cols);

// The same for an array that is written: also writable, its rows apart.
Rows expect_out(const Array& array, std::initializer_list<DType> dtypes, int64_t rows, int64_t cols);

// The elements of a checked 1-D array.
template <class T>
T* elements(const Rows& view) {
    return static_cast<T*>(view.data);
}

// Throws std::out_of_range unless first <= x < last for every element.
template <class T>
void expect_between(const char* argument, const T* x, int64_t count, int64_t first, int64_t last) {
    for (int64_t i = 0; x && i < count; ++i) {
        if (x[i] < first || x[i] >= last)
            throw std::out_of_range(std::string(argument) + " must be in [" + std::to_string(first) + ", " +
                                    std::to_string(last) + "), got " + std::to_string(x[i]) + " at " +
                                    std::to_string(i));
    }
}

}  // namespace emocore
