// Kernels of cubins, Triton's and nvcc's alike: loaded once, launched without an allocation, from any thread.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "parameters.h"

namespace emocore {

// How an entry of a cubin is called.
struct Form {
    std::string name;
    std::string parameters;  // in the words of Parameters
    unsigned threads;        // a block
    unsigned shared;         // bytes of dynamic shared memory
    std::array<unsigned, 3> cluster;
    bool programmatic;  // it starts early, and waits itself for what is ahead of it in the stream
};

// A handle of the entry on the calling thread's device, where it stays for the life of the process.
// Throws DeviceError; std::invalid_argument for a cubin that is no whole file, or unknown parameters.
int load_kernel(const void* cubin, size_t bytes, const Form& form);

struct Launch {
    std::array<unsigned, 3> grid;  // blocks
    uint64_t stream;
    size_t count;
    Value arguments[MOST_ARGUMENTS];
};

// False, and nothing is done, where the kernel does not fit the arguments or is not on the calling thread's
// device. Throws DeviceError.
bool launch(int handle, Launch& call);

}  // namespace emocore
