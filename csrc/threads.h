// Parallel loops on the OpenMP team that torch already runs.
#pragma once
#include <cstdint>
#include <string>

namespace emocore {

// Calls body(context, member, part) once for every part in [0, parts), with 0 <= member < threads and no
// member twice at a time. Parts are handed out one by one, so a team that turns out smaller still does all
// the work; what a part computes must not depend on who computes it. The body must not throw.
void run_parts(int threads, int64_t parts, void (*body)(void* context, int member, int64_t part),
               void* context);

// Path of the libgomp in use, "" when none is loaded (our own pool serves then).
std::string openmp_path();

// Below this many elements a team costs more than it brings.
constexpr int64_t SERIAL_WORK = 32768;

inline int team(int threads, int64_t work) { return work < SERIAL_WORK ? 1 : threads; }

template <class Body>
void parallel(int threads, int64_t parts, const Body& body) {
    run_parts(
        threads, parts,
        [](void* context, int member, int64_t part) { (*static_cast<const Body*>(context))(member, part); },
        const_cast<Body*>(&body));
}

}  // namespace emocore
