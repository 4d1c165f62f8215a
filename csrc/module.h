// The parts of emocore._C. Only the files of this stem see Python.
#pragma once
#include <pybind11/pybind11.h>

namespace emocore {

namespace py = pybind11;

void bind_cpu(py::module_& m);
void bind_driver(py::module_& m);
void bind_ring(py::module_& m);

}  // namespace emocore
