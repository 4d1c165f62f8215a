#include "launching.h"

#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "driver.h"

namespace emocore {
namespace {

const char* const NO_CONTEXT = "Use the device first, for example by torch.empty(0, device='cuda').";
const char* const NOT_LOADED =
    "Build for this device with `emocore aot`; without, kernels compile when first called.";
const char* const NOT_LAUNCHED =
    "Failures of earlier kernels show here too: CUDA_LAUNCH_BLOCKING=1 finds them.";

constexpr unsigned MUCH_SHARED = 48 * 1024;  // bytes a block, from which on they come before the L1 cache
constexpr unsigned ANY_CLUSTER = 8;          // blocks that a cluster may have without asking

struct Kernel {
    Form form;
    Parameters parameters;
    abi::Attribute attributes[2];
    unsigned attribute_count;
    const Driver* driver;
    void *context, *function;
    int device;
};

class Kernels {
  public:
    int add(Kernel kernel) {
        const std::lock_guard<std::mutex> guard(mutex_);
        all_.push_back(std::move(kernel));
        return static_cast<int>(all_.size()) - 1;
    }

    const Kernel& at(int handle) {
        const std::lock_guard<std::mutex> guard(mutex_);
        if (handle < 0 || static_cast<size_t>(handle) >= all_.size())
            throw std::invalid_argument("handles: no kernel has " + std::to_string(handle));
        return all_[static_cast<size_t>(handle)];
    }

  private:
    std::mutex mutex_;
    std::deque<Kernel> all_;  // never moves what it holds
};

Kernels& loaded() {
    static Kernels& kernels = *new Kernels;  // outlives every thread
    return kernels;
}

// A library that is unloaded again unless it is kept.
struct Library {
    const Driver& driver;
    void* handle = nullptr;
    ~Library() {
        if (handle) driver.cuLibraryUnload(handle);
    }
};

// Throws unless it is an ELF file as long as it says: the driver is told no length.
void expect_whole(const void* cubin, size_t bytes, const std::string& name) {
    const char* data = static_cast<const char*>(cubin);
    uint64_t sections = 0;
    uint16_t size = 0, count = 0;
    if (bytes >= 64) {
        std::memcpy(&sections, data + 40, 8);
        std::memcpy(&size, data + 58, 2);
        std::memcpy(&count, data + 60, 2);
    }
    const uint64_t length = uint64_t{size} * count;
    if (bytes < 64 || std::memcmp(data, "\177ELF", 4) || sections > bytes || length > bytes - sections)
        throw std::invalid_argument("cubin: that of " + name + " is no whole ELF file, got " +
                                    std::to_string(bytes) + " bytes");
}

std::string listed(const std::vector<unsigned>& sizes) {
    std::string text = std::to_string(sizes.size()) + " parameters of";
    for (unsigned size : sizes) text += " " + std::to_string(size);
    return text + " bytes";
}

// Throws unless the entry takes what it will be given, as far as this driver can tell.
void expect_sizes(const Driver& driver, void* entry, const Kernel& kernel) {
    if (!driver.cuKernelGetParamInfo) return;
    std::vector<unsigned> found;
    size_t offset = 0, size = 0;
    while (driver.cuKernelGetParamInfo(entry, found.size(), &offset, &size) == abi::SUCCESS)
        found.push_back(static_cast<unsigned>(size));
    if (found != kernel.parameters.sizes)
        throw DeviceError(kernel.form.name + ": the cubin does not take what it would be given, " +
                              listed(kernel.parameters.sizes),
                          listed(found), NOT_LOADED);
}

unsigned cluster_blocks(const Form& form) { return form.cluster[0] * form.cluster[1] * form.cluster[2]; }

void set_attributes(Kernel& kernel) {
    if (cluster_blocks(kernel.form) != 1) {
        abi::Attribute& cluster = kernel.attributes[kernel.attribute_count++];
        cluster.id = abi::CLUSTER;
        std::memcpy(cluster.cluster, kernel.form.cluster.data(), sizeof cluster.cluster);
    }
    if (kernel.form.programmatic) {
        abi::Attribute& early = kernel.attributes[kernel.attribute_count++];
        early.id = abi::PROGRAMMATIC;
        early.programmatic = 1;
    }
}

// Whether the calling thread is where the kernel is; one that has used no device yet is put there.
bool here(const Kernel& kernel) {
    const Driver& driver = *kernel.driver;
    void* context = nullptr;
    abi::Result result = driver.cuCtxGetCurrent(&context);
    if (result == abi::SUCCESS && context) return context == kernel.context;
    if (result == abi::SUCCESS) result = driver.cuCtxSetCurrent(kernel.context);
    if (result != abi::SUCCESS)
        driver.check(result, "cuCtxSetCurrent(" + kernel.form.name + ")", "", NO_CONTEXT);
    return true;
}

// Whether the device can read every tensor: its own, and those in pinned memory, whose addresses there are
// taken.
bool reachable(const Kernel& kernel, Launch& call) {
    for (Value* value = call.arguments; value < call.arguments + call.count; ++value) {
        if (value->kind != Kind::tensor || value->device == kernel.device) continue;
        uint64_t there = 0;
        if (value->device >= 0 ||
            kernel.driver->cuPointerGetAttribute(&there, abi::DEVICE_POINTER, value->address) != abi::SUCCESS)
            return false;
        value->address = there;
        value->device = kernel.device;
    }
    return true;
}

void submit(const Kernel& kernel, const Launch& call, void** parameters) {
    const auto& [x, y, z] = call.grid;
    const Form& form = kernel.form;
    const abi::Config config{{x, y, z},         {form.threads, 1, 1},
                             form.shared,       reinterpret_cast<void*>(call.stream),
                             kernel.attributes, kernel.attribute_count};
    const abi::Result result = kernel.driver->cuLaunchKernelEx(&config, kernel.function, parameters, nullptr);
    if (result == abi::SUCCESS) return;
    const std::string grid = std::to_string(x) + " x " + std::to_string(y) + " x " + std::to_string(z);
    kernel.driver->check(result, "cuLaunchKernelEx(" + form.name + ")",
                         ", for " + grid + " blocks of " + std::to_string(form.threads) + " threads and " +
                             std::to_string(form.shared) + " bytes",
                         NOT_LAUNCHED);
}

}  // namespace

int load_kernel(const void* cubin, size_t bytes, const Form& form) {
    Kernel kernel{form, Parameters(form.parameters), {}, 0, nullptr, nullptr, nullptr, 0};
    set_attributes(kernel);
    expect_whole(cubin, bytes, form.name);
    const Driver& driver = need_driver();
    kernel.driver = &driver;
    const auto check = [&](abi::Result result, const char* function, const char* way_out = NOT_LOADED) {
        driver.check(result, std::string(function) + "(" + form.name + ")", "", way_out);
    };
    check(driver.cuCtxGetCurrent(&kernel.context), "cuCtxGetCurrent", NO_CONTEXT);
    if (!kernel.context)
        throw DeviceError(form.name + ": the thread has no CUDA context", "none", NO_CONTEXT);
    check(driver.cuCtxGetDevice(&kernel.device), "cuCtxGetDevice");

    Library library{driver};
    void* entry = nullptr;
    check(driver.cuLibraryLoadData(&library.handle, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0),
          "cuLibraryLoadData");
    check(driver.cuLibraryGetKernel(&entry, library.handle, form.name.c_str()), "cuLibraryGetKernel");
    check(driver.cuKernelGetFunction(&kernel.function, entry), "cuKernelGetFunction");  // onto the device
    expect_sizes(driver, entry, kernel);
    const auto set = [&](int attribute, int value) {
        check(driver.cuFuncSetAttribute(kernel.function, attribute, value), "cuFuncSetAttribute");
    };
    if (form.shared) set(abi::MAX_DYNAMIC_SHARED, static_cast<int>(form.shared));
    if (form.shared > MUCH_SHARED) set(abi::SHARED_CARVEOUT, 100);  // percent
    if (cluster_blocks(form) > ANY_CLUSTER) set(abi::ANY_CLUSTER_SIZE, 1);
    library.handle = nullptr;  // kept
    return loaded().add(std::move(kernel));
}

bool launch(int handle, Launch& call) {
    const Kernel& kernel = loaded().at(handle);
    Packed packed;
    if (!here(kernel) || !reachable(kernel, call) ||
        !packed.fill(kernel.parameters, call.arguments, call.count))
        return false;
    submit(kernel, call, packed.pointers);
    return true;
}

}  // namespace emocore
