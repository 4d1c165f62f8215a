// emocore._C, for Python.
#include "module.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of emocore, the ring to files, and the launcher of GPU kernels.";
    emocore::bind_cpu(m);
    emocore::bind_ring(m);
    emocore::bind_driver(m);
}
