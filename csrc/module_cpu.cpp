// The CPU kernels for Python. Arrays come as NumPy arrays or as (address, dtype, rows, cols, row_stride).
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>

#include "arguments.h"
#include "dispatch.h"
#include "module.h"
#include "scratch.h"
#include "threads.h"

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
    job.readers = narrow ? expect(vectors, {job.rows.dtype}, parts * K, D)
                         : expect(vectors, {DType::float32, DType::float64}, parts * K, D);
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

// Operations that a team does in `turns` rounds of multiply-adds on registers: what the clock is to be read around.
double peak(const std::string& arithmetic, int64_t turns, int threads) {
    const Peak job{dtype_named(arithmetic, "peak: arithmetic"), turns, checked("peak", threads)};
    if (job.arithmetic != DType::float64 && job.arithmetic != DType::float32 && job.arithmetic != DType::bfloat16)
        throw std::invalid_argument("peak: arithmetic must be float64, float32 or bfloat16, got " + arithmetic);
    if (turns < 0) throw std::invalid_argument("peak: turns must be >= 0, got " + std::to_string(turns));
    py::gil_scoped_release release;
    return kernels().peak(job);
}

}  // namespace

void bind_cpu(py::module_& m) {
    using py::arg;
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
}

}  // namespace emocore
