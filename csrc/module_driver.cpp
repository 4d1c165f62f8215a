// The launcher of GPU kernels for Python, to which tensors come as torch has them.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string_view>

#include "driver.h"
#include "gram_cuda.h"
#include "launching.h"
#include "module.h"

namespace emocore {
namespace {

void raise_device_error(std::exception_ptr thrown) {
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const DeviceError& error) {
        const py::object type = py::module_::import("emocore.errors").attr("DeviceError");
        py::set_error(type,
                      type(error.what(), py::arg("got") = error.got, py::arg("way_out") = error.way_out));
    }
}

// Of a torch.dtype, which is always the same object.
Element element_of(const py::object& dtype) {
    static std::vector<std::pair<PyObject*, Element>> known;
    for (const auto& [object, element] : known)
        if (object == dtype.ptr()) return element;
    static const std::pair<const char*, Element> names[] = {
        {"torch.bool", Element::i1},      {"torch.int8", Element::i8},       {"torch.uint8", Element::u8},
        {"torch.int16", Element::i16},    {"torch.int32", Element::i32},     {"torch.int64", Element::i64},
        {"torch.float16", Element::fp16}, {"torch.bfloat16", Element::bf16}, {"torch.float32", Element::fp32},
        {"torch.float64", Element::fp64}};
    const std::string name = py::str(dtype);
    for (const auto& [text, element] : names)
        if (name == text) return known.emplace_back(dtype.inc_ref().ptr(), element).second;
    return Element::unknown;
}

// An int64 of an object, an error cleared and false where it is none.
bool integer_of(const py::object& object, int64_t& value) {
    value = object ? PyLong_AsLongLong(object.ptr()) : -1;
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
}

// A tensor, or what answers like one; Kind::other for the rest.
Value tensor_value(PyObject* object) {
    static PyObject* const dtype = PyUnicode_InternFromString("dtype");
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const get_device = PyUnicode_InternFromString("get_device");
    const auto own = py::reinterpret_steal<py::object>;
    Value value{};
    int64_t address = 0, device = 0;
    const py::object type = own(PyObject_GetAttr(object, dtype));
    if (type && integer_of(own(PyObject_CallMethodNoArgs(object, data_ptr)), address) &&
        integer_of(own(PyObject_CallMethodNoArgs(object, get_device)), device)) {
        value.kind = Kind::tensor;
        value.element = element_of(type);
        value.device = static_cast<int>(device);
        value.address = static_cast<uint64_t>(address);
    }
    PyErr_Clear();
    return value;
}

Value value_of(PyObject* object) {
    Value value{};
    if (object == Py_None) {
        value.kind = Kind::none;
    } else if (PyLong_Check(object)) {
        value.element = PyBool_Check(object) ? Element::i1 : Element::i64;
        value.kind = integer_of(py::reinterpret_borrow<py::object>(object), value.integer) ? Kind::integer
                                                                                           : Kind::other;
    } else if (PyFloat_Check(object)) {
        value.kind = Kind::real;
        value.real = PyFloat_AS_DOUBLE(object);
    } else if (PyBytes_Check(object)) {
        value.kind = Kind::map;
        value.bytes = PyBytes_AS_STRING(object);
        value.length = static_cast<size_t>(PyBytes_GET_SIZE(object));
    } else {
        return tensor_value(object);
    }
    return value;
}

int driver_load(const py::bytes& cubin, const std::string& name, const std::string& parameters,
                unsigned threads, unsigned shared, std::array<unsigned, 3> cluster, bool programmatic) {
    const std::string_view data = cubin;
    const py::gil_scoped_release release;
    return load_kernel(data.data(), data.size(), {name, parameters, threads, shared, cluster, programmatic});
}

bool driver_launch(const py::tuple& handles, const py::tuple& grid, uint64_t stream,
                   const py::tuple& arguments) {
    Launch call{{1, 1, 1}, stream, arguments.size(), {}};
    if (grid.size() > 3)
        throw std::invalid_argument("grid must have 1 to 3 axes, got " + std::to_string(grid.size()));
    for (size_t i = 0; i < grid.size(); ++i) call.grid[i] = grid[i].cast<unsigned>();
    if (call.count > MOST_ARGUMENTS) return false;
    for (size_t i = 0; i < call.count; ++i) call.arguments[i] = value_of(arguments[i].ptr());
    for (const py::handle handle : handles)
        if (launch(handle.cast<int>(), call)) return true;
    return false;
}

py::bytes driver_tensor_map(uint64_t address, const std::string& dtype, std::vector<uint64_t> shape,
                            std::vector<uint64_t> strides, std::vector<unsigned> box, unsigned swizzle) {
    const auto map = encode(
        {address, element_named(dtype), std::move(shape), std::move(strides), std::move(box), swizzle});
    return py::bytes(map.data(), map.size());
}

// How csrc/gram_cuda.cu is called for y of so many parts: entry, parameters, threads, shared bytes.
py::tuple gram_cuda_form(int parts) {
    if (parts != 1 && parts != 2) throw std::invalid_argument("gram_cuda: parts must be 1 or 2");
    return py::make_tuple(gram_cuda::ENTRIES[parts - 1], "map *i32:16 *i64 *fp64:16 i32 i32 i32",
                          gram_cuda::THREADS, gram_cuda::SHARED_BYTES);
}

// Its map of y at an address.
py::bytes gram_cuda_map(uint64_t address, uint64_t hooks, uint64_t parts, uint64_t block, uint64_t dim) {
    using gram_cuda::DEPTH, gram_cuda::GROUP;
    return driver_tensor_map(address, "fp16", {hooks * parts, block, dim}, {block * dim, dim, 1},
                             {1, DEPTH, GROUP}, 2 * GROUP);
}

}  // namespace

void bind_driver(py::module_& m) {
    using py::arg;
    py::register_exception_translator(raise_device_error);
    m.def("driver_available", driver_available);
    m.def("driver_open", open_driver, arg("path"));
    m.def("driver_relax", relax);
    m.def("driver_load", driver_load, arg("cubin"), arg("name"), arg("parameters"), arg("threads"),
          arg("shared") = 0, arg("cluster") = std::array<unsigned, 3>{1, 1, 1}, arg("programmatic") = false);
    m.def("driver_launch", driver_launch, arg("handles"), arg("grid"), arg("stream"), arg("arguments"));
    m.def("driver_tensor_map", driver_tensor_map, arg("address"), arg("dtype"), arg("shape"), arg("strides"),
          arg("box"), arg("swizzle") = 128);
    m.def("gram_cuda_form", gram_cuda_form, arg("parts"));
    m.def("gram_cuda_grid", gram_cuda::grid, arg("hooks"), arg("dim"), arg("multiprocessors"));
    m.def("gram_cuda_map", gram_cuda_map, arg("address"), arg("hooks"), arg("parts"), arg("block"),
          arg("dim"));
}

}  // namespace emocore
