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

#include "kernels_cpu.h"

namespace emocore {

static bool usable() { return true; }

const Kernels scalar_kernels = table("scalar", usable, usable);

}  // namespace emocore
