// emocore._C: the CPU kernels, and the launcher of GPU kernels, for Python.
// Arrays come as NumPy arrays or as (address, dtype, rows, cols, row_stride); to GPU kernels, as torch
// tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string_view>

#include "arguments.h"
#include "crc32c.h"
#include "dispatch.h"
#include "driver.h"
#include "fetch.h"
#include "gather.h"
#include "gram_cuda.h"
#include "launching.h"
#include "ring.h"
#include "scratch.h"
#include "threads.h"

namespace py = pybind11;

namespace emocore {
namespace {

DType numpy_dtype(const py::array& array, const std::string& name) {
    if (py::isinstance<py::array_t<double>>(array)) return DType::float64;
    if (py::isinstance<py::array_t<float>>(array)) return DType::float32;
    if (py::isinstance<py::array_t<int64_t>>(array)) return DType::int64;
    if (py::isinstance<py::array_t<int32_t>>(array)) return DType::int32;
    if (py::isinstance<py::array_t<uint8_t>>(array)) return DType::uint8;
    if (array.dtype().equal(py::dtype("float16"))) return DType::float16;
    throw std::invalid_argument(name + " has dtype " + std::string(py::str(array.dtype())) +
                                ", which no kernel reads");
}

// Rows of the last axis: [n] is one row, [a, b, c] is a * b rows where those are evenly spaced.
Array from_numpy(const py::array& array, const std::string& name) {
    const int64_t axes = array.ndim(), size = array.itemsize();
    if (axes == 0) throw std::invalid_argument(name + " must have at least one axis, got a scalar");
    Rows view{const_cast<void*>(array.data()), numpy_dtype(array, name), 1, array.shape(axes - 1), 0};
    bool rows_even = view.cols <= 1 || array.strides(axes - 1) == size;
    int64_t stride = view.cols * size;  // bytes between rows, set by the innermost axis that has several
    for (int64_t axis = axes - 2; axis >= 0; --axis) {
        const int64_t count = array.shape(axis);
        if (view.rows == 1)
            stride = count == 1 ? stride : array.strides(axis);
        else if (count > 1)
            rows_even = rows_even && array.strides(axis) == stride * view.rows;
        view.rows *= count;
    }
    const bool empty = view.rows == 0 || view.cols == 0;
    if (!empty && (!rows_even || stride % size))
        throw std::invalid_argument(
            name + " must be contiguous in its last axis with evenly spaced rows, got strides " +
            std::string(py::str(array.attr("strides"))));
    view.stride = stride / size;
    return {name, view, array.writeable()};
}

Array from_tuple(const py::tuple& tuple, const std::string& name) {
    Rows view;
    view.data = reinterpret_cast<void*>(tuple[0].cast<uintptr_t>());
    view.dtype = dtype_named(tuple[1].cast<std::string>(), name);
    view.rows = tuple[2].cast<int64_t>();
    view.cols = tuple[3].cast<int64_t>();
    view.stride = tuple[4].cast<int64_t>();
    if (view.rows < 0 || view.cols < 0)
        throw std::invalid_argument(name + " must have rows, cols >= 0, got " + std::to_string(view.rows) +
                                    ", " + std::to_string(view.cols));
    return {name, view};
}

Array array(const char* name, const py::object& object) {
    if (py::isinstance<py::array>(object)) return from_numpy(object.cast<py::array>(), name);
    if (py::isinstance<py::tuple>(object) && py::len(object) == 5) {
        try {
            return from_tuple(object.cast<py::tuple>(), name);
        } catch (const py::cast_error&) {
        }
    }
    throw std::invalid_argument(std::string(name) +
                                " must be a NumPy array or (address, dtype, rows, cols, row_stride), got " +
                                std::string(py::repr(object)).substr(0, 80));
}

Rows activations(const Array& array) {
    if (array.view.cols == 0) throw std::invalid_argument(array.name + " must have D >= 1 columns, got 0");
    return expect(array, {DType::float64, DType::float32, DType::bfloat16, DType::float16}, array.view.rows,
                  array.view.cols);
}

// The elements of an optional 1-D array.
template <class T>
const T* vector_or_null(const char* name, const py::object& object, DType dtype, int64_t count) {
    return object.is_none() ? nullptr : elements<const T>(expect(array(name, object), {dtype}, 1, count));
}

int checked(const char* op, int threads) {
    if (threads < 1 || threads > 1024)
        throw std::invalid_argument(std::string(op) + ": threads must be in [1, 1024], got " +
                                    std::to_string(threads));
    return threads;
}

int64_t stage(const py::object& source, const py::object& index, const py::object& out,
              const py::object& norms, const py::object& finite, int threads) {
    Stage job{};
    job.source = activations(array("stage: source", source));
    const int64_t D = job.source.cols;
    const Array picks = index.is_none() ? Array{} : array("stage: index", index);
    const int64_t n = index.is_none() ? job.source.rows : picks.view.cols;
    if (!index.is_none()) job.index = elements<const int64_t>(expect(picks, {DType::int64}, 1, n));
    job.out = expect_out(array("stage: out", out), {job.source.dtype}, n, D);
    job.norms = elements<double>(expect_out(array("stage: norms", norms), {DType::float64}, 1, n));
    job.finite = elements<uint8_t>(expect_out(array("stage: finite", finite), {DType::uint8}, 1, n));
    job.threads = checked("stage", threads);

    py::gil_scoped_release release;
    expect_between("stage: index", job.index, n, 0, job.source.rows);
    kernels().stage(job);
    int64_t bad = 0;
    for (int64_t j = 0; j < n; ++j) bad += !job.finite[j];
    return bad;
}

void label_sums(const py::object& rows, const py::object& labels, const py::object& weights,
                const py::object& shift, const py::object& sums, const py::object& squares, int threads) {
    LabelSums job{};
    job.rows = activations(array("label_sums: rows", rows));
    const int64_t N = job.rows.rows, D = job.rows.cols;
    job.labels = vector_or_null<int32_t>("label_sums: labels", labels, DType::int32, N);
    job.weights = vector_or_null<double>("label_sums: weights", weights, DType::float64, N);
    job.shift = elements<const double>(expect(array("label_sums: shift", shift), {DType::float64}, 1, D));
    const Array totals = array("label_sums: sums", sums);
    const int64_t K = totals.view.rows;
    if (K == 0) throw std::invalid_argument("label_sums: sums must have K >= 1 rows, got 0");
    job.sums = expect_out(totals, {DType::float64}, K, D);
    if (!squares.is_none())
        job.squares = expect_out(array("label_sums: squares", squares), {DType::float64}, K, D);
    job.threads = checked("label_sums", threads);

    py::gil_scoped_release release;
    expect_between("label_sums: labels", job.labels, N, -1, K);
    kernels().label_sums(job);
}

void gram(const py::object& rows, const py::object& weights, const py::object& shift, const py::object& tiles,
          int threads) {
    Gram job{};
    job.rows = activations(array("gram: rows", rows));
    const int64_t N = job.rows.rows, D = job.rows.cols, P = (D + TILE - 1) / TILE;
    job.weights = vector_or_null<double>("gram: weights", weights, DType::float64, N);
    job.shift = elements<const double>(expect(array("gram: shift", shift), {DType::float64}, 1, D));
    const Array packed = array("gram: tiles, as rows,", tiles);
    const int64_t T = P * (P + 1) / 2;  // a row is a tile, or a row of a tile
    const bool by_tile = packed.view.cols == TILE * TILE;
    job.tiles = elements<double>(
        expect_out(packed, {DType::float64}, by_tile ? T : T * TILE, by_tile ? TILE * TILE : TILE));
    if (packed.view.stride != packed.view.cols)
        throw std::invalid_argument("gram: tiles must be contiguous, got row stride " +
                                    std::to_string(packed.view.stride));
    job.threads = checked("gram", threads);

    py::gil_scoped_release release;
    for (int64_t r = 0; job.weights && r < N; ++r)
        if (!(job.weights[r] >= 0 && std::isfinite(job.weights[r])))
            throw std::invalid_argument("gram: weights must be finite and >= 0, got " +
                                        std::to_string(job.weights[r]) + " at " + std::to_string(r));
    kernels().gram(job);
}

void project(const py::object& rows, const py::object& readers, const py::object& centre, bool normalise,
             const py::object& out, int threads, int64_t parts, const py::object& offset, const py::object& mean,
             const py::object& std) {
    Project job{};
    job.rows = activations(array("project: rows", rows));
    const int64_t N = job.rows.rows, D = job.rows.cols;
    const Array vectors = array("project: readers", readers);
    if (parts < 1 || vectors.view.rows % parts)
        throw std::invalid_argument("project: parts must divide the readers, got " + std::to_string(parts) + " of " +
                                    std::to_string(vectors.view.rows));
    const int64_t K = vectors.view.rows / parts;
    if (K == 0) throw std::invalid_argument("project: readers must have K >= 1 rows, got 0");
    job.parts = parts;
    const bool narrow = element_size(job.rows.dtype) == 2 && vectors.view.dtype == job.rows.dtype;
    job.readers = expect(vectors, {DType::float32, DType::float64, narrow ? job.rows.dtype : DType::float64},
                         parts * K, D);
    job.centre = vector_or_null<double>("project: centre", centre, DType::float64, D);
    job.offset = vector_or_null<double>("project: offset", offset, DType::float64, K);
    job.normalise = normalise;
    job.mean = vector_or_null<double>("project: mean", mean, DType::float64, K);
    job.std = vector_or_null<double>("project: std", std, DType::float64, K);
    job.out = expect_out(array("project: out", out), {DType::float32, DType::float64}, N, K);
    job.threads = checked("project", threads);

    py::gil_scoped_release release;
    kernels().project(job);
}

void pool_scores(const py::object& scores, const py::object& starts, const py::object& largest,
                 const py::object& mean, int threads) {
    PoolScores job{};
    const Array given = array("pool_scores: scores", scores), edges = array("pool_scores: starts", starts);
    const int64_t N = given.view.rows, K = given.view.cols, B = edges.view.cols - 1;
    if (B < 0) throw std::invalid_argument("pool_scores: starts must have an end, got none");
    job.scores = expect(given, {DType::float32, DType::float64}, N, K);
    job.starts = elements<const int64_t>(expect(edges, {DType::int64}, 1, B + 1));
    job.largest = expect_out(array("pool_scores: largest", largest), {DType::float32}, B, K);
    job.mean = expect_out(array("pool_scores: mean", mean), {DType::float32}, B, K);
    job.threads = checked("pool_scores", threads);

    py::gil_scoped_release release;
    expect_between("pool_scores: starts", job.starts, B + 1, 0, N + 1);
    kernels().pool_scores(job);
}

void steer_add(const py::object& rows, const py::object& delta, const py::object& out, int threads) {
    SteerAdd job{};
    job.rows = activations(array("steer_add: rows", rows));
    job.delta = expect(array("steer_add: delta", delta), {DType::float32, DType::float64}, 1, job.rows.cols);
    job.out = expect_out(array("steer_add: out", out), {job.rows.dtype}, job.rows.rows, job.rows.cols);
    job.threads = checked("steer_add", threads);

    py::gil_scoped_release release;
    kernels().steer_add(job);
}

// Of the whole pages of memory that nobody has written to yet.
void large_pages(const py::object& memory) {
    constexpr uintptr_t PAGE = 4096;
    const Array fresh = array("large_pages: memory", memory);
    const uintptr_t start = reinterpret_cast<uintptr_t>(fresh.view.data), first = (start + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = start + fresh.view.rows * fresh.view.stride * element_size(fresh.view.dtype);
    if (first < end) want_large_pages(reinterpret_cast<void*>(first), end - first);
}

// A table of steering, in the type of its sums.
Rows table(const char* name, const py::object& object, const Rows& rows, int64_t count, int64_t cols) {
    const DType wide = rows.dtype == DType::float64 ? DType::float64 : DType::float32;
    return expect(array(name, object), {wide}, count, cols);
}

int64_t rows_in(const char* name, const py::object& object) { return array(name, object).view.rows; }

// Slots of `size` with the readers and levels that a row must exceed.
RowSlots slots_of(const Rows& rows, const py::object& slots, const py::object& readers, const py::object& levels,
               int64_t size) {
    RowSlots found{nullptr, 1, size, {}, {}};
    if (!slots.is_none()) {
        const Array given = array("steer: slots", slots);
        const int64_t count = given.view.cols;
        found.of = elements<const int32_t>(expect(given, {DType::int32}, 1, count));
        if (rows.rows > 0 && (count == 0 || rows.rows % count))
            throw std::invalid_argument("steer: slots must divide the " + std::to_string(rows.rows) + " rows, got " +
                                        std::to_string(count));
        found.share = rows.rows > 0 ? rows.rows / count : 1;
    }
    if (!readers.is_none()) {
        const int64_t W = rows_in("steer: readers", readers);
        found.readers = table("steer: readers", readers, rows, W, rows.cols);
        found.levels = table("steer: levels", levels, rows, size, W);
    }
    return found;
}

void steer_slots(const py::object& rows, const py::object& slots, const py::object& readers,
                 const py::object& levels, const py::object& out, int threads) {
    SteerSlots job{};
    job.rows = activations(array("steer: rows", rows));
    job.slots = slots_of(job.rows, slots, readers, levels, rows_in("steer: levels", levels));
    job.out = elements<int32_t>(expect_out(array("steer: out", out), {DType::int32}, 1, job.rows.rows));
    job.threads = checked("steer", threads);

    py::gil_scoped_release release;
    kernels().steer_slots(job);
}

void steer_edit(const py::object& rows, const py::object& slots, const py::object& readers,
                const py::object& levels, const py::object& deltas, const py::object& basis,
                const py::object& dual, const py::object& target, const py::object& gate, const py::object& out,
                int threads) {
    SteerEdit job{};
    job.rows = activations(array("steer: rows", rows));
    const int64_t D = job.rows.cols;
    const int64_t S = slots.is_none() ? 1 : rows_in("steer: deltas", deltas);
    job.slots = slots_of(job.rows, slots, readers, levels, S);
    job.first_slot = slots.is_none() ? 1 : 0;
    if (!deltas.is_none()) job.deltas = table("steer: deltas", deltas, job.rows, S, D);
    if (!basis.is_none()) {
        const int64_t R = rows_in("steer: basis", basis);
        job.basis = table("steer: basis", basis, job.rows, R, D);
        job.dual = table("steer: dual", dual, job.rows, R, D);
        job.target = table("steer: target", target, job.rows, S, R);
        if (!gate.is_none()) job.gate = table("steer: gate", gate, job.rows, S, R);
    }
    job.out = expect_out(array("steer: out", out), {job.rows.dtype}, job.rows.rows, D);
    job.threads = checked("steer", threads);

    py::gil_scoped_release release;
    kernels().steer_edit(job);
}

// --- kernels on a GPU

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

// Operations that a team does in `turns` rounds of multiply-adds on registers: what the clock is to be read around.
double peak(const std::string& arithmetic, int64_t turns, int threads) {
    const Peak job{dtype_named(arithmetic, "peak: arithmetic"), turns, checked("peak", threads)};
    if (job.arithmetic != DType::float64 && job.arithmetic != DType::float32 && job.arithmetic != DType::bfloat16)
        throw std::invalid_argument("peak: arithmetic must be float64, float32 or bfloat16, got " + arithmetic);
    if (turns < 0) throw std::invalid_argument("peak: turns must be >= 0, got " + std::to_string(turns));
    py::gil_scoped_release release;
    return kernels().peak(job);
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

// --- the ring

// A stream as Python holds it, and the ring that it must not outlive.
struct OpenStream {
    std::shared_ptr<Ring> ring;
    Ring::Handle stream;
    std::unique_ptr<Fetch> fetch;  // made for the first rows that come from a GPU
    ~OpenStream() { ring->abandon(stream); }
};

// Ctrl-C is heard within a wait.
Patience patient(double seconds) {
    return {seconds, [] {
                const py::gil_scoped_acquire acquire;
                if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            }};
}

const char* said(Outcome outcome) {
    static const char* const names[] = {"done", "full", "late", "failed", "closed", "forked"};
    return names[static_cast<int>(outcome)];
}

// In a child of fork() it has no writers to wait for, and is left alone.
std::shared_ptr<Ring> ring_new(int slots, int64_t slot_bytes, int threads, double throttle) {
    if (slots < 1 || threads < 1 || slot_bytes < PAGE || slot_bytes % PAGE)
        throw std::invalid_argument(
            "Ring: slots and threads must be at least 1, slot_bytes a multiple of 4096");
    return {new Ring(slots, slot_bytes, threads, throttle), [](Ring* ring) {
                const py::gil_scoped_release release;
                if (!ring->forked()) delete ring;
            }};
}

py::tuple ring_close(Ring& ring, double seconds) {
    int error = 0;
    Outcome outcome;
    {
        const py::gil_scoped_release release;
        outcome = ring.close(patient(seconds), error);
    }
    return py::make_tuple(said(outcome), error);
}

const char* stream_append(OpenStream& open, uintptr_t address, int64_t rows, int64_t width, int64_t stride,
                          bool wait, double seconds) {
    const Bytes bytes{reinterpret_cast<const char*>(address), rows, width, stride};
    const auto copy = [&](int64_t from, int64_t count, char* to, uint32_t crc) {
        return gather(bytes, from, count, to, crc);
    };
    return said(open.ring->append(open.stream, {rows * width, copy}, wait, patient(seconds)));
}

const char* stream_append_device(OpenStream& open, uint64_t address, int64_t bytes, uint64_t after, bool wait,
                                 double seconds) {
    open.ring->pin();
    const auto copy = [&](int64_t from, int64_t count, char* to, uint32_t crc) {
        if (!open.fetch || !open.fetch->here()) open.fetch = std::make_unique<Fetch>();
        if (from == 0) open.fetch->after(after);
        return open.fetch->copy(address + from, count, to, crc);
    };
    return said(open.ring->append(open.stream, {bytes, copy}, wait, patient(seconds)));
}

uint32_t checksum(const py::buffer& data, uint32_t crc, bool portable) {
    const py::buffer_info found = data.request();
    const size_t bytes = static_cast<size_t>(found.size * found.itemsize);
    const py::gil_scoped_release release;
    return portable ? crc32c_portable(crc, found.ptr, bytes) : crc32c(crc, found.ptr, bytes);
}

void bind_ring(py::module_& m) {
    using py::arg;
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    py::class_<OpenStream>(m, "Stream")
        .def("append", stream_append, arg("address"), arg("rows"), arg("width"), arg("stride"), arg("wait"),
             arg("seconds"), nogil)
        .def("append_device", stream_append_device, arg("address"), arg("bytes"), arg("after"), arg("wait"),
             arg("seconds"), nogil)
        .def(
            "flush",
            [](OpenStream& open, double seconds) {
                return said(open.ring->flush(open.stream, patient(seconds)));
            },
            arg("seconds"), nogil)
        .def("standing",
             [](const OpenStream& open) {
                 const Standing now = open.ring->standing(open.stream);
                 return py::make_tuple(now.bytes, now.crc, now.error);
             })
        .def("room", [](const OpenStream& open) { return open.ring->room(open.stream); });
    py::class_<Ring, std::shared_ptr<Ring>>(m, "Ring")
        .def(py::init(&ring_new), arg("slots"), arg("slot_bytes"), arg("threads"), arg("throttle"))
        .def(
            "open",
            [](const std::shared_ptr<Ring>& ring, int handle, int64_t offset, bool direct) {
                Ring::Handle stream = ring->open(handle, offset, direct);
                return std::unique_ptr<OpenStream>(new OpenStream{ring, std::move(stream), nullptr});
            },
            arg("handle"), arg("offset"), arg("direct"))
        .def("live",
             [](Ring& ring) {
                 const RingState now = ring.live();
                 return py::make_tuple(now.slots, now.free, now.in_flight, now.bytes_written, now.writing,
                                       now.waited);
             })
        .def("close", ring_close, arg("seconds"))
        .def_property_readonly("forked", &Ring::forked);
    m.def("crc32c", checksum, arg("data"), arg("crc") = 0, arg("portable") = false);
}

}  // namespace
}  // namespace emocore

PYBIND11_MODULE(_C, m) {
    using namespace emocore;
    using py::arg;
    m.doc() = "CPU kernels of emocore, and the launcher of its GPU kernels.";
    m.attr("TILE") = TILE;
    m.attr("CHAIN") = CHAIN;
    m.attr("BLOCK_CHAINS") = BLOCK_CHAINS;
    m.def("stage", stage, arg("source"), arg("index"), arg("out"), arg("norms"), arg("finite"),
          arg("threads"));
    m.def("label_sums", label_sums, arg("rows"), arg("labels"), arg("weights"), arg("shift"), arg("sums"),
          arg("squares"), arg("threads"));
    m.def("gram", gram, arg("rows"), arg("weights"), arg("shift"), arg("tiles"), arg("threads"));
    m.def("project", project, arg("rows"), arg("readers"), arg("centre"), arg("normalise"), arg("out"),
          arg("threads"), arg("parts") = 1, arg("offset") = py::none(), arg("mean") = py::none(),
          arg("std") = py::none());
    m.def("pool_scores", pool_scores, arg("scores"), arg("starts"), arg("largest"), arg("mean"), arg("threads"));
    m.def("steer_add", steer_add, arg("rows"), arg("delta"), arg("out"), arg("threads"));
    m.def("steer_slots", steer_slots, arg("rows"), arg("slots"), arg("readers"), arg("levels"), arg("out"),
          arg("threads"));
    m.def("steer_edit", steer_edit, arg("rows"), arg("slots"), arg("readers"), arg("levels"), arg("deltas"),
          arg("basis"), arg("dual"), arg("target"), arg("gate"), arg("out"), arg("threads"));
    m.def("large_pages", large_pages, arg("memory"));
    m.def("peak", peak, arg("arithmetic"), arg("turns"), arg("threads"));
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("isas", usable_isas);
    m.def("use_isa", use_isa, arg("name"));
    m.def("openmp", openmp_path);

    bind_ring(m);

    py::register_exception_translator(raise_device_error);
    m.def("driver_available", driver_available);
    m.def("driver_open", open_driver, arg("path"));
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
