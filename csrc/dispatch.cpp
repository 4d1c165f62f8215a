#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace emocore {
namespace {

// Narrowest first.
const Kernels* const built[] = {
    &scalar_kernels,
#ifdef __x86_64__
    &avx2_kernels,
#endif
};

const Kernels* widest() {
    const Kernels* best = built[0];
    for (const Kernels* isa : built)
        if (isa->usable()) best = isa;
    return best;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> isa{widest()};
    return isa;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Kernels* isa : built)
        if (isa->usable()) names.emplace_back(isa->name);
    return names;
}

void use_isa(const std::string& name) {
    std::string known;
    for (const Kernels* isa : built) {
        if (!isa->usable()) continue;
        if (name == isa->name) {
            chosen() = isa;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(isa->name);
    }
    throw std::invalid_argument("use_isa: expected one of " + known + ", got '" + name + "'");
}

}  // namespace emocore
