// Every kernel, for the instruction set whose vectors are included before.
#pragma once

#include "gram_cpu.h"
#include "label_sums_cpu.h"
#include "peak_cpu.h"
#include "pool_scores_cpu.h"
#include "project_operands_cpu.h"
#include "project_tiles_cpu.h"
#include "project_few_cpu.h"
#include "project_cpu.h"
#include "row_scores_cpu.h"
#include "stage_cpu.h"
#include "steer_cpu.h"
#include "steer_slots_cpu.h"
#include "steer_sets_cpu.h"

namespace emocore {
namespace {

// The table of a set; `usable` and `worthwhile` as in Kernels.
constexpr Kernels table(const char* name, bool (*usable)(), bool (*worthwhile)()) {
    return {name,        usable,    worthwhile,  stage,      label_sums, gram, project,
            pool_scores, steer_add, steer_slots, steer_edit, peak};
}

// The same with another gram and another peak.
constexpr Kernels with(Kernels kernels, void (*gram)(const Gram&), double (*peak)(const Peak&)) {
    kernels.gram = gram;
    kernels.peak = peak;
    return kernels;
}

}  // namespace
}  // namespace emocore
