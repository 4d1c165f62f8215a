#include "driver.h"

#ifdef __linux__
#include <dlfcn.h>
#endif

#include <atomic>
#include <type_traits>

namespace emocore {
namespace {

constexpr size_t MOST_AXES = 5;  // of a tensor map

const char* const WAY_OUT =
    "Kernels need an NVIDIA driver of CUDA 12 or newer; without one, compute on the CPU.";

#ifdef __linux__
// Null, and why, where the library or one of its functions is not there.
const Driver* look(const char* path, std::string& why) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);  // torch's, where it has loaded it
    if (!library) library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        why = dlerror();
        return nullptr;
    }
    Driver driver{};
    const auto find = [&](const char* name, auto& function) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
        if (!function && why.empty()) why = std::string(path) + " has no " + name;
    };
    find("cuKernelGetParamInfo", driver.cuKernelGetParamInfo);
    why.clear();  // it may be without that one
    find("cuGetErrorName", driver.cuGetErrorName);
    find("cuGetErrorString", driver.cuGetErrorString);
    find("cuCtxGetCurrent", driver.cuCtxGetCurrent);
    find("cuCtxSetCurrent", driver.cuCtxSetCurrent);
    find("cuCtxGetDevice", driver.cuCtxGetDevice);
    find("cuPointerGetAttribute", driver.cuPointerGetAttribute);
    find("cuLibraryLoadData", driver.cuLibraryLoadData);
    find("cuLibraryUnload", driver.cuLibraryUnload);
    find("cuLibraryGetKernel", driver.cuLibraryGetKernel);
    find("cuKernelGetFunction", driver.cuKernelGetFunction);
    find("cuFuncSetAttribute", driver.cuFuncSetAttribute);
    find("cuLaunchKernelEx", driver.cuLaunchKernelEx);
    find("cuTensorMapEncodeTiled", driver.cuTensorMapEncodeTiled);
    find("cuMemHostRegister_v2", driver.cuMemHostRegister_v2);
    find("cuMemHostUnregister", driver.cuMemHostUnregister);
    find("cuMemcpyDtoHAsync_v2", driver.cuMemcpyDtoHAsync_v2);
    find("cuStreamCreate", driver.cuStreamCreate);
    find("cuStreamDestroy_v2", driver.cuStreamDestroy_v2);
    find("cuStreamSynchronize", driver.cuStreamSynchronize);
    find("cuStreamWaitEvent", driver.cuStreamWaitEvent);
    find("cuEventCreate", driver.cuEventCreate);
    find("cuEventDestroy_v2", driver.cuEventDestroy_v2);
    find("cuEventRecord", driver.cuEventRecord);
    find("cuEventSynchronize", driver.cuEventSynchronize);
    find("cuThreadExchangeStreamCaptureMode", driver.cuThreadExchangeStreamCaptureMode);
    return why.empty() ? new Driver(driver) : nullptr;
}
#else
const Driver* look(const char*, std::string& why) {
    why = "there is none for this system";
    return nullptr;
}
#endif

std::atomic<const Driver*> opened{nullptr};  // never freed: kernels refer to it

const Driver* find_driver(std::string& why) {
    if (!opened) opened = look("libcuda.so.1", why);  // a lost race leaks one small struct
    return opened;
}

// Throws std::invalid_argument for what the driver would refuse without saying why.
void expect_map(const TensorMap& map) {
    const size_t rank = map.shape.size();
    const uint64_t bytes = element_bytes(map.element);
    const auto refuse = [](bool wrong, const char* why) {
        if (wrong) throw std::invalid_argument(std::string("tensor_map: ") + why);
    };
    refuse(rank < 1 || rank > MOST_AXES || map.strides.size() != rank || map.box.size() != rank,
           "shape, strides and box must have one length of 1 to 5");
    refuse(map.element != Element::fp16 && map.element != Element::bf16 && map.element != Element::fp32,
           "elements must be fp16, bf16 or fp32");
    refuse(map.swizzle != 0 && map.swizzle != 32 && map.swizzle != 64 && map.swizzle != 128,
           "swizzle must be 0, 32, 64 or 128");
    refuse(map.address % 16 || !map.address, "the address must be divisible by 16");
    refuse(map.strides[rank - 1] != 1, "the last axis must have stride 1");
    for (size_t i = 0; i < rank; ++i) {
        refuse(map.shape[i] < 1 || map.shape[i] > uint64_t{1} << 32, "a shape must be in [1, 2^32]");
        refuse(map.box[i] < 1 || map.box[i] > 256, "a box must be in [1, 256]");
        refuse(i + 1 < rank && (map.strides[i] >= (uint64_t{1} << 40) / bytes || map.strides[i] * bytes % 16),
               "strides must be divisible by 16 bytes and below 2^40");
    }
    const uint64_t row = map.box[rank - 1] * bytes;
    refuse(row % 16 || (map.swizzle && row > map.swizzle),
           "rows of the box must be divisible by 16 bytes, and no longer than the swizzle");
}

}  // namespace

void Driver::check(abi::Result result, const std::string& what, const std::string& detail,
                   const char* way_out) const {
    if (result == abi::SUCCESS) return;
    const char *name = nullptr, *text = nullptr;
    cuGetErrorName(result, &name);
    cuGetErrorString(result, &text);
    std::string got = name ? name : "error " + std::to_string(result);
    if (text) got += std::string(", ") + text;
    throw DeviceError(what + " failed", got + detail, way_out);
}

bool driver_available() {
    std::string why;
    return find_driver(why) != nullptr;
}

bool open_driver(const std::string& path) {
    std::string why;
    opened = path.empty() ? nullptr : look(path.c_str(), why);
    return path.empty() ? driver_available() : opened != nullptr;
}

const Driver& need_driver() {
    std::string why;
    if (const Driver* driver = find_driver(why)) return *driver;
    throw DeviceError("the CUDA driver cannot be used", why, WAY_OUT);
}

void relax() {
    int mode = abi::RELAXED;
    const Driver& driver = need_driver();
    driver.check(driver.cuThreadExchangeStreamCaptureMode(&mode), "cuThreadExchangeStreamCaptureMode", "",
                 WAY_OUT);
}

std::array<char, MAP_BYTES> encode(const TensorMap& map) {
    expect_map(map);
    const unsigned rank = static_cast<unsigned>(map.shape.size());
    uint64_t shape[MOST_AXES], strides[MOST_AXES];  // innermost first, which has no stride
    unsigned box[MOST_AXES], steps[MOST_AXES];
    for (unsigned i = 0; i < rank; ++i) {
        const unsigned axis = rank - 1 - i;
        shape[i] = map.shape[axis];
        box[i] = map.box[axis];
        steps[i] = 1;
        if (i) strides[i - 1] = map.strides[axis] * element_bytes(map.element);
    }
    const int element = map.element == Element::fp16   ? abi::FLOAT16
                        : map.element == Element::bf16 ? abi::BFLOAT16
                                                       : abi::FLOAT32;
    const auto swizzle = static_cast<abi::Swizzle>(map.swizzle == 128 ? 3 : map.swizzle / 32);
    const Driver& driver = need_driver();
    alignas(MAP_BYTES) std::array<char, MAP_BYTES> out{};
    driver.check(driver.cuTensorMapEncodeTiled(out.data(), element, rank,
                                               reinterpret_cast<void*>(map.address), shape, strides, box,
                                               steps, abi::NO_INTERLEAVE, swizzle, abi::L2_256B, abi::ZEROS),
                 "cuTensorMapEncodeTiled", "", WAY_OUT);
    return out;
}

}  // namespace emocore
