#include "arguments.h"

#include <algorithm>
#include <stdexcept>

namespace emocore {
namespace {

struct DTypeFacts {
    DType dtype;
    const char* name;
    int64_t size;
};

constexpr DTypeFacts facts[] = {
    {DType::float64, "float64", 8}, {DType::float32, "float32", 4}, {DType::bfloat16, "bfloat16", 2},
    {DType::float16, "float16", 2}, {DType::int64, "int64", 8},     {DType::int32, "int32", 4},
    {DType::uint8, "uint8", 1},
};

std::string shape_text(int64_t rows, int64_t cols) {
    return "[" + (rows == 1 ? "" : std::to_string(rows) + ", ") + std::to_string(cols) + "]";
}

[[noreturn]] void refuse(const Array& array, const std::string& expected, const std::string& got) {
    throw std::invalid_argument(array.name + " must be " + expected + ", got " + got);
}

}  // namespace

int64_t element_size(DType dtype) { return facts[static_cast<int>(dtype)].size; }

const char* dtype_name(DType dtype) { return facts[static_cast<int>(dtype)].name; }

DType dtype_named(const std::string& name, const std::string& argument) {
    std::string known;
    for (const DTypeFacts& fact : facts) {
        if (name == fact.name) return fact.dtype;
        known += std::string(known.empty() ? "" : ", ") + fact.name;
    }
    throw std::invalid_argument(argument + ": dtype must be one of " + known + ", got '" + name + "'");
}

Rows expect(const Array& array, std::initializer_list<DType> dtypes, int64_t rows, int64_t cols) {
    const Rows& view = array.view;
    const bool known = std::find(dtypes.begin(), dtypes.end(), view.dtype) != dtypes.end();
    if (!known || view.rows != rows || view.cols != cols) {
        std::string names;
        for (DType dtype : dtypes) names += std::string(names.empty() ? "" : " or ") + dtype_name(dtype);
        refuse(array, names + " " + shape_text(rows, cols),
               dtype_name(view.dtype) + std::string(" ") + shape_text(view.rows, view.cols));
    }
    if (rows == 0 || cols == 0) return view;
    if (!view.data) refuse(array, "at an address", "0");
    if (reinterpret_cast<uintptr_t>(view.data) % element_size(view.dtype))
        refuse(array, "aligned to its elements", "an address between them");
    return view;
}

Rows expect_out(const Array& array, std::initializer_list<DType> dtypes, int64_t rows, int64_t cols) {
    const Rows view = expect(array, dtypes, rows, cols);
    if (!array.writable) refuse(array, "writable", "a read-only array");
    if (rows > 1 && std::abs(view.stride) < cols)
        refuse(array, "of separate rows (row stride >= " + std::to_string(cols) + ")",
               "row stride " + std::to_string(view.stride));
    return view;
}

}  // namespace emocore
