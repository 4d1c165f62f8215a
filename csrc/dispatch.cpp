#include "dispatch.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace emocore {
namespace {

// Narrowest first.
const Kernels* const built[] = {
    &scalar_kernels,
#ifdef __x86_64__
    &avx2_kernels,
    &avx512_kernels,
    &avx512_bf16_kernels,
#ifdef __linux__
    &amx_bf16_kernels,
#endif
#endif
};

const Kernels* fastest() {
    const Kernels* best = built[0];
    for (const Kernels* isa : built)
        if (isa->worthwhile()) best = isa;
    return best;
}

const Kernels* named(const std::string& name, const std::string& argument) {
    std::string known;
    for (const std::string& isa : usable_isas()) known += (known.empty() ? "" : ", ") + isa;
    for (const Kernels* isa : built)
        if (isa->usable() && name == isa->name) return isa;
    throw std::invalid_argument(argument + ": expected one of " + known + ", got '" + name + "'");
}

const Kernels* chosen_at_start() {
    const char* forced = std::getenv("EMOCORE_ISA");
    return forced && *forced ? named(forced, "EMOCORE_ISA") : fastest();
}

// Null until the first use: a name in the environment that nothing answers to is an error of that call.
std::atomic<const Kernels*> chosen{nullptr};

#ifdef __x86_64__
struct Leaf {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    explicit Leaf(unsigned number) { __get_cpuid_count(number, 0, &eax, &ebx, &ecx, &edx); }
};

bool is_set(unsigned flags, int bit) { return flags >> bit & 1; }
#endif

}  // namespace

#ifdef __x86_64__
bool has_f16c() { return is_set(Leaf(1).ecx, 29); }
bool has_amx_bf16() { return is_set(Leaf(7).edx, 22) && is_set(Leaf(7).edx, 24); }
#endif

const Kernels& kernels() {
    const Kernels* isa = chosen;
    if (!isa) chosen = isa = chosen_at_start();
    return *isa;
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Kernels* isa : built)
        if (isa->usable()) names.emplace_back(isa->name);
    return names;
}

void use_isa(const std::string& name) { chosen = named(name, "use_isa"); }

}  // namespace emocore
