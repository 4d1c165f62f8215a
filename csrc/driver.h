// The CUDA driver, found at run time: nothing is linked. What it makes lives as long as the process.
#pragma once
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "driver_abi.h"
#include "parameters.h"

namespace emocore {

// What the driver refused: emocore.errors.DeviceError.
struct DeviceError : std::runtime_error {
    DeviceError(const std::string& what, std::string got_, std::string way_out_)
        : std::runtime_error(what), got(std::move(got_)), way_out(std::move(way_out_)) {}
    std::string got, way_out;
};

struct Driver : abi::Functions {
    // Throws DeviceError unless the result is a success; `detail` follows the error's name.
    void check(abi::Result result, const std::string& what, const std::string& detail,
               const char* way_out) const;
};

// The driver of this machine, libcuda.so.1. Opening another library is for tests; "" goes back.
bool driver_available();
bool open_driver(const std::string& path);
const Driver& need_driver();  // throws DeviceError

// From now on this thread may copy, wait and allocate while another records a graph: it has no part in it.
void relax();

// The view of a tensor [.., rows, cols] through which a kernel copies blocks of `box` elements. Axes are
// outermost first, strides in elements; rows of the box are `swizzle` (0, 32, 64, 128) bytes or less; outside
// lie zeros.
struct TensorMap {
    uint64_t address;
    Element element;
    std::vector<uint64_t> shape, strides;
    std::vector<unsigned> box;
    unsigned swizzle;
};
std::array<char, MAP_BYTES> encode(const TensorMap& map);

}  // namespace emocore
