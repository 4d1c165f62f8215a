// The ring for Python.
#include <stdexcept>

#include "crc32c.h"
#include "fetch.h"
#include "gather.h"
#include "module.h"
#include "ring.h"

namespace emocore {
namespace {

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

}  // namespace

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

}  // namespace emocore
