// The operations, one argument struct each, and the table in which an instruction set offers them.
// Arguments arrive checked: shapes agree, labels and indices are in range, N may be 0, D is at least 1.
#pragma once
#include "rows.h"

namespace emocore {

// The summation tree of emocore/precision.py: fp32 along a chain, fp32 along a block of chains, float64 after that.
constexpr int64_t TILE = 128;         // columns of one tile of the packed covariance
constexpr int64_t CHAIN = 256;        // consecutive rows (columns, in project) summed by one register
constexpr int64_t BLOCK_CHAINS = 32;  // chains summed before the fold into float64

struct Stage {
    Rows source;           // [R, D]
    const int64_t* index;  // [n], or null: every row in order
    Rows out;              // [n, D]
    double* norms;         // [n]
    uint8_t* finite;       // [n]
    int threads;
};

struct LabelSums {
    Rows rows;              // [N, D]
    const int32_t* labels;  // [N], or null: all 0
    const double* weights;  // [N], or null: all 1
    const double* shift;    // [D]
    Rows sums;              // [K, D] float64
    Rows squares;           // [K, D] float64, data null when not wanted
    int threads;
};

struct Gram {
    Rows rows;              // [N, D]
    const double* weights;  // [N] >= 0, or null: all 1
    const double* shift;    // [D]
    double* tiles;          // [T, TILE, TILE], lower tiles by rows
    int threads;
};

struct Project {
    Rows rows;             // [N, D]
    Rows readers;          // [K, D] float32 or float64
    const double* centre;  // [D], or null: zero
    bool normalise;
    Rows out;  // [N, K] float32 or float64
    int threads;
};

struct SteerAdd {
    Rows rows;   // [N, D]
    Rows delta;  // [1, D] float32 or float64
    Rows out;    // [N, D], may be `rows`
    int threads;
};

struct Peak {
    DType arithmetic;  // float64, float32 or bfloat16
    int64_t turns;
    int threads;
};

struct Kernels {
    const char* name;
    bool (*usable)();
    bool (*worthwhile)();  // and not slower than those before it
    void (*stage)(const Stage&);
    void (*label_sums)(const LabelSums&);
    void (*gram)(const Gram&);
    void (*project)(const Project&);
    void (*steer_add)(const SteerAdd&);
    double (*peak)(const Peak&);  // operations done
};

}  // namespace emocore
