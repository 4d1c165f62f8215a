// The kernels for any machine.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

#include "simd_scalar.h"

#include "lanes_cpu.h"
#include "panel_cpu.h"

#include "gram_cpu.h"
#include "label_sums_cpu.h"
#include "project_operands_cpu.h"
#include "project_tiles_cpu.h"
#include "project_few_cpu.h"
#include "project_cpu.h"
#include "pool_scores_cpu.h"
#include "row_scores_cpu.h"
#include "stage_cpu.h"
#include "steer_cpu.h"
#include "steer_slots_cpu.h"
#include "steer_sets_cpu.h"

namespace emocore {

static bool usable() { return true; }

const Kernels scalar_kernels = {
    "scalar", usable, usable, stage, label_sums, gram, project, pool_scores, steer_add, steer_slots, steer_edit};

}  // namespace emocore
