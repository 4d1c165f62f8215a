#include "openmp.h"

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>

namespace emocore {
namespace {

// Several may be loaded, one per package that bundles its own: torch's is the one whose threads are warm.
int note_libgomp(dl_phdr_info* object, size_t, void* found) {
    const char* slash = std::strrchr(object->dlpi_name, '/');
    const char* name = slash ? slash + 1 : object->dlpi_name;
    if (std::strncmp(name, "libgomp", 7) != 0) return 0;
    std::string& path = *static_cast<std::string*>(found);
    const bool from_torch = std::strstr(object->dlpi_name, "torch") != nullptr;
    if (path.empty() || from_torch) path = object->dlpi_name;
    return from_torch;
}

const OpenMP* look() {
    std::string path;
    dl_iterate_phdr(note_libgomp, &path);
    void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    void* parallel = library ? dlsym(library, "GOMP_parallel") : nullptr;
    if (!parallel) return nullptr;
    return new OpenMP{path, reinterpret_cast<decltype(OpenMP::parallel)>(parallel)};
}

}  // namespace

const OpenMP* find_openmp() {
    // Kept for the life of the process; a lost race leaks one small struct.
    static std::atomic<const OpenMP*> known{nullptr};
    if (!known) known = look();
    return known;
}

}  // namespace emocore
#else
namespace emocore {

const OpenMP* find_openmp() { return nullptr; }

}  // namespace emocore
#endif
