#include "fetch.h"

#include <algorithm>

#include "crc32c.h"

namespace emocore {
namespace {

constexpr int64_t PIECE = 1 << 20;  // bytes, enough for the rate of the link

const char* const WAY_OUT = "Append the rows' .cpu(). Failures of earlier kernels show here too.";

}  // namespace

Fetch::Fetch() : driver_(need_driver()), context_(current()) {
    if (!context_) throw DeviceError("no CUDA context on this thread", "none", "Use the device first.");
    check(driver_.cuStreamCreate(&stream_, abi::NON_BLOCKING), "cuStreamCreate");
}

// What the driver says at the end of a process is of no use to anybody.
Fetch::~Fetch() {
    for (void* event : events_) driver_.cuEventDestroy_v2(event);
    if (stream_) driver_.cuStreamDestroy_v2(stream_);
}

bool Fetch::here() const { return current() == context_; }

void* Fetch::current() const {
    void* context = nullptr;
    check(driver_.cuCtxGetCurrent(&context), "cuCtxGetCurrent");
    return context;
}

void Fetch::after(uint64_t stream) {
    check(driver_.cuEventRecord(event(0), reinterpret_cast<void*>(stream)), "cuEventRecord");
    check(driver_.cuStreamWaitEvent(stream_, event(0), 0), "cuStreamWaitEvent");
}

uint32_t Fetch::copy(uint64_t from, int64_t count, char* to, uint32_t crc) {
    const auto run = [count](int64_t at) { return static_cast<size_t>(std::min(PIECE, count - at)); };
    try {
        for (int64_t at = 0, i = 1; at < count; at += PIECE, ++i) {
            check(driver_.cuMemcpyDtoHAsync_v2(to + at, from + at, run(at), stream_), "cuMemcpyDtoHAsync");
            check(driver_.cuEventRecord(event(i), stream_), "cuEventRecord");
        }
        for (int64_t at = 0, i = 1; at < count; at += PIECE, ++i) {
            check(driver_.cuEventSynchronize(event(i)), "cuEventSynchronize");
            crc = crc32c(crc, to + at, run(at));
        }
    } catch (...) {
        driver_.cuStreamSynchronize(stream_);  // nothing arrives in memory that is somebody else's by then
        throw;
    }
    return crc;
}

void Fetch::check(abi::Result result, const char* call) const {
    driver_.check(result, std::string(call) + " of rows to the host", "", WAY_OUT);
}

// A wait for it sleeps, and leaves the core to others.
void* Fetch::event(size_t index) {
    while (events_.size() <= index) {
        void* made = nullptr;
        check(driver_.cuEventCreate(&made, abi::BLOCKING_SYNC | abi::DISABLE_TIMING), "cuEventCreate");
        events_.push_back(made);
    }
    return events_[index];
}

}  // namespace emocore
