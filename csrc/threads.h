// Parallel loops on the OpenMP team that torch already runs.
#pragma once
#include <cstdint>
#include <string>

namespace emocore {

// A loop of parts, handed out one by one in order: a team that turns out smaller, or late, still does all the
// work. What a part computes must not depend on who computes it; the body must not throw.
struct Parts {
    int64_t count;
    void (*body)(void* context, int member, int64_t part);  // members are below `threads`, one part at a time
    int64_t (*after)(void* context, int64_t part);          // a part starts when all before this one are done
    void* context;
};

void run_parts(int threads, const Parts& parts);

// Path of the libgomp in use, "" when none is loaded (our own pool serves then).
std::string openmp_path();

// Below this many elements a team costs more than it brings.
constexpr int64_t SERIAL_WORK = 32768;

inline int team(int threads, int64_t work) { return work < SERIAL_WORK ? 1 : threads; }

// body(member, part) for every part in [0, count); a part waits for all the parts before after(part).
// Stages of one loop cost less than loops of their own, whose every end waits for the whole team to wake.
template <class After, class Body>
void parallel(int threads, int64_t count, const After& after, const Body& body) {
    struct Both {
        const After& after;
        const Body& body;
    } both{after, body};
    const auto call = [](void* context, int member, int64_t part) {
        static_cast<Both*>(context)->body(member, part);
    };
    const auto wait_for = [](void* context, int64_t part) -> int64_t {
        return static_cast<Both*>(context)->after(part);
    };
    run_parts(threads, Parts{count, call, wait_for, &both});
}

template <class Body>
void parallel(int threads, int64_t count, const Body& body) {
    parallel(threads, count, [](int64_t) { return 0; }, body);
}

}  // namespace emocore
