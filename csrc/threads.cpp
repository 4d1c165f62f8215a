#include "threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

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
    for (int64_t part = loop.next++; part < loop.parts; part = loop.next++) loop.body(loop.context, member, part);
}

// A child of fork() has none of its parent's threads: waiting for them would hang.
std::atomic<bool> forked{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Serves where no OpenMP runtime is loaded. One loop at a time; a second caller works alone.
class Pool {
  public:
    ~Pool() {
        // After a fork the handles name threads that do not exist here: they can only be let go.
        if (forked) {
            for (std::thread& helper : helpers_) helper.detach();
            return;
        }
        {
            std::lock_guard lock(mutex_);
            closing_ = true;
        }
        wake_.notify_all();
        for (std::thread& helper : helpers_) helper.join();
    }

    void run(int threads, Loop& loop) {
        std::unique_lock turn(turn_, std::try_to_lock);
        if (!turn) return join_in(&loop);
        {
            std::lock_guard lock(mutex_);
            while (static_cast<int>(helpers_.size()) < threads - 1) helpers_.emplace_back([this] { serve(); });
            loop_ = &loop;
            seats_ = threads - 1;
        }
        wake_.notify_all();
        join_in(&loop);
        std::unique_lock lock(mutex_);
        seats_ = 0;  // no latecomers: the loop lives on this stack
        idle_.wait(lock, [this] { return working_ == 0; });
    }

  private:
    void serve() {
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return closing_ || seats_ > 0; });
            if (closing_) return;
            --seats_;
            ++working_;
            Loop* loop = loop_;
            lock.unlock();
            join_in(loop);
            lock.lock();
            if (--working_ == 0) idle_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, idle_;
    std::vector<std::thread> helpers_;
    Loop* loop_ = nullptr;
    int seats_ = 0, working_ = 0;
    bool closing_ = false;
};

// GOMP_parallel(body, argument, threads, flags): what `#pragma omp parallel` compiles to.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct OpenMP {
    std::string path;
    GompParallel parallel = nullptr;
};

int note_libgomp(dl_phdr_info* object, size_t, void* found) {
    const char* slash = std::strrchr(object->dlpi_name, '/');
    const char* name = slash ? slash + 1 : object->dlpi_name;
    if (std::strncmp(name, "libgomp", 7) != 0) return 0;
    std::string& path = *static_cast<std::string*>(found);
    const bool from_torch = std::strstr(object->dlpi_name, "torch") != nullptr;
    if (path.empty() || from_torch) path = object->dlpi_name;
    return from_torch;
}

// torch's own team: a second pool beside it oversubscribes the cores. torch may be imported after us, so a miss
// is looked up again.
const OpenMP* find_openmp() {
    static std::atomic<const OpenMP*> known{nullptr};
    if (const OpenMP* openmp = known) return openmp;
    std::string path;
    dl_iterate_phdr(note_libgomp, &path);
    if (path.empty()) return nullptr;
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return nullptr;
    auto parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
    if (!parallel) return nullptr;
    // Kept for the life of the process: a lost race leaks one small struct.
    known = new OpenMP{path, parallel};
    return known;
}

}  // namespace

void run_parts(int threads, int64_t parts, void (*body)(void*, int, int64_t), void* context) {
    Loop loop{parts, body, context};
    if (parts < threads) threads = static_cast<int>(parts);
    if (threads <= 1 || forked) return join_in(&loop);
    if (const OpenMP* openmp = find_openmp()) {
        openmp->parallel(join_in, &loop, static_cast<unsigned>(threads), 0);
    } else {
        static Pool pool;
        pool.run(threads, loop);
    }
}

std::string openmp_path() {
    const OpenMP* openmp = find_openmp();
    return openmp ? openmp->path : "";
}

}  // namespace emocore
