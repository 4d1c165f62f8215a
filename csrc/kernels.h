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
    Rows readers;          // [parts * K, D] float32, float64 or as the rows, the parts of a reader K rows apart
    int64_t parts;         // that add up to the readers
    const double* centre;  // [D], or null: zero
    const double* offset;  // [K], or null: zero
    bool normalise;
    const double* mean;  // [K], or null: zero
    const double* std;   // [K], or null: one
    Rows out;            // [N, K] float32 or float64
    int threads;
};

struct PoolScores {
    Rows scores;            // [N, K] float32 or float64
    const int64_t* starts;  // [B + 1], in [0, N]
    Rows largest;           // [B, K] float32
    Rows mean;              // [B, K] float32
    int threads;
};

struct SteerAdd {
    Rows rows;   // [N, D]
    Rows delta;  // [1, D] float32 or float64
    Rows out;    // [N, D], may be `rows`
    int threads;
};

// Every `share` rows have a slot, and slot s stands in row s of a table; slot 0, or one past the tables, is
// nothing. Tables and directions are float64 for float64 rows, else float32.
struct RowSlots {
    const int32_t* of;  // [N / share], or null: every row has slot 1
    int64_t share;
    int64_t size;  // S
    Rows readers;  // [W, D]: a row whose scores do not all exceed
    Rows levels;   // [S, W] its slot's levels has none; W = 0 without
};

struct SteerSlots {
    Rows rows;  // [N, D]
    RowSlots slots;
    int32_t* out;  // [N]
    int threads;
};

struct SteerEdit {
    Rows rows;  // [N, D]
    RowSlots slots;
    int64_t first_slot;  // what the first row of a table is of
    Rows deltas;         // [S, D], data null: zero
    Rows basis, dual;    // [R, D]
    Rows target;         // [S, R]
    Rows gate;           // [S, R], data null: 1
    Rows out;            // [N, D], may be `rows`
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
    void (*pool_scores)(const PoolScores&);
    void (*steer_add)(const SteerAdd&);
    void (*steer_slots)(const SteerSlots&);
    void (*steer_edit)(const SteerEdit&);
    double (*peak)(const Peak&);  // operations done
};

}  // namespace emocore
