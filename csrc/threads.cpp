#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <memory>

#include "openmp.h"
#include "pool.h"

namespace emocore {
namespace {

struct Loop {
    int64_t parts;
    void (*body)(void*, int, int64_t);
    void* context;
    std::atomic<int> members{0};
    std::atomic<int64_t> next{0};
};

void join_in(void* shared) {
    Loop& loop = *static_cast<Loop*>(shared);
    const int member = loop.members++;
    for (int64_t part = loop.next++; part < loop.parts; part = loop.next++)
        loop.body(loop.context, member, part);
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

void run_parts(int threads, int64_t parts, void (*body)(void*, int, int64_t), void* context) {
    Loop loop{parts, body, context};
    if (parts < threads) threads = static_cast<int>(parts);
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
