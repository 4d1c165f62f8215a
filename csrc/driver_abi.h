// What is called of the CUDA driver, declared by its documented layout: building needs no CUDA header.
// tests/test_driver.py calls through it into a library that is compiled with NVIDIA's own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emocore::abi {

using Result = int;
constexpr Result SUCCESS = 0;

// Attributes of a function.
constexpr int MAX_DYNAMIC_SHARED = 8, SHARED_CARVEOUT = 9, ANY_CLUSTER_SIZE = 14;

constexpr int DEVICE_POINTER = 3;  // attribute of an address

// Attributes of a launch.
constexpr int CLUSTER = 4, PROGRAMMATIC = 6;
struct Attribute {
    int id;
    char pad[4];
    union {
        char room[64];
        unsigned cluster[3];
        int programmatic;
    };
};

struct Config {
    unsigned grid[3], block[3], shared;
    void* stream;
    const Attribute* attributes;
    unsigned count;
};

// Of a tensor map.
enum class Swizzle : int { none, bytes32, bytes64, bytes128 };
constexpr int FLOAT16 = 6, FLOAT32 = 7, BFLOAT16 = 9, NO_INTERLEAVE = 0, L2_256B = 3, ZEROS = 0;

// Flags of pinned memory, streams and events.
constexpr int RELAXED = 2;  // of a thread, beside others that record graphs
constexpr unsigned PORTABLE = 1, NON_BLOCKING = 1, BLOCKING_SYNC = 1, DISABLE_TIMING = 2;

// The driver's functions, by name. Contexts, libraries, kernels, functions are opaque.
struct Functions {
    Result (*cuGetErrorName)(Result, const char** name);
    Result (*cuGetErrorString)(Result, const char** text);
    Result (*cuCtxGetCurrent)(void** context);
    Result (*cuCtxSetCurrent)(void* context);
    Result (*cuCtxGetDevice)(int* device);
    Result (*cuPointerGetAttribute)(void* value, int attribute, uint64_t address);
    Result (*cuLibraryLoadData)(void** library, const void* code, int* jit, void** jit_values, unsigned jits,
                                int* options, void** option_values, unsigned options_count);
    Result (*cuLibraryUnload)(void* library);
    Result (*cuLibraryGetKernel)(void** kernel, void* library, const char* name);
    Result (*cuKernelGetFunction)(void** function, void* kernel);
    Result (*cuKernelGetParamInfo)(void* kernel, size_t index, size_t* offset, size_t* size);  // since 12.4
    Result (*cuFuncSetAttribute)(void* function, int attribute, int value);
    Result (*cuLaunchKernelEx)(const Config*, void* function, void** parameters, void** extra);
    Result (*cuTensorMapEncodeTiled)(void* map, int element, unsigned rank, void* address,
                                     const uint64_t* shape, const uint64_t* strides, const unsigned* box,
                                     const unsigned* steps, int interleave, Swizzle, int l2, int outside);
    Result (*cuMemHostRegister_v2)(void* memory, size_t bytes, unsigned flags);
    Result (*cuMemHostUnregister)(void* memory);
    Result (*cuMemcpyDtoHAsync_v2)(void* to, uint64_t from, size_t bytes, void* stream);
    Result (*cuStreamCreate)(void** stream, unsigned flags);
    Result (*cuStreamDestroy_v2)(void* stream);
    Result (*cuStreamSynchronize)(void* stream);
    Result (*cuStreamWaitEvent)(void* stream, void* event, unsigned flags);
    Result (*cuEventCreate)(void** event, unsigned flags);
    Result (*cuEventDestroy_v2)(void* event);
    Result (*cuEventRecord)(void* event, void* stream);
    Result (*cuEventSynchronize)(void* event);
    Result (*cuThreadExchangeStreamCaptureMode)(int* mode);
};

}  // namespace emocore::abi
