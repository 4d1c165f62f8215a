#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <memory>
#include <thread>

#include "openmp.h"
#include "pool.h"

namespace emocore {
namespace {

// Looks at a stage that is not due before the core is offered to others.
constexpr int SPINS = 1000;

struct Loop {
    Parts parts;
    std::atomic<int> members{0};
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
};

// Nothing past a stage that waits is done, so `done` reaches `due` just when all the parts before it are.
void join_in(void* shared) {
    Loop& loop = *static_cast<Loop*>(shared);
    const Parts& parts = loop.parts;
    const int member = loop.members++;
    for (int64_t part = loop.next++; part < parts.count; part = loop.next++) {
        const int64_t due = parts.after(parts.context, part);
        for (int spins = 0; loop.done < due; ++spins)
            if (spins >= SPINS) std::this_thread::yield();
        parts.body(parts.context, member, part);
        ++loop.done;
    }
}

// A child of fork() has none of its parent's threads: waiting for them would hang.
std::atomic<bool> forked{false};
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Joined at exit, unless this is a child, whose helpers stayed in the parent.
Pool& own_pool() {
    static const std::unique_ptr<Pool, void (*)(Pool*)> pool(new Pool, [](Pool* old) {
        if (!forked) delete old;
    });
    return *pool;
}

}  // namespace

void run_parts(int threads, const Parts& parts) {
    Loop loop{parts};
    if (parts.count < threads) threads = static_cast<int>(parts.count);
    if (threads <= 1 || forked) return join_in(&loop);
    if (const OpenMP* openmp = find_openmp())
        openmp->parallel(join_in, &loop, static_cast<unsigned>(threads), 0);
    else
        own_pool().parallel(join_in, &loop, threads);
}

std::string openmp_path() {
    const OpenMP* openmp = find_openmp();
    return openmp ? openmp->path : "";
}

}  // namespace emocore
