// What every kernel reads and writes: rows of elements, contiguous in the last axis.
#pragma once
#include <cstdint>

namespace emocore {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

enum class DType { float64, float32, bfloat16, float16, int64, int32, uint8 };

// [rows, cols], `stride` elements from one row to the next.
struct Rows {
    void* data = nullptr;
    DType dtype = DType::float32;
    int64_t rows = 0;
    int64_t cols = 0;
    int64_t stride = 0;
};

}  // namespace emocore
