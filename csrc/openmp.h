// The OpenMP team that torch runs on, found at run time: nothing is linked.
#pragma once
#include <string>

namespace emocore {

struct OpenMP {
    std::string path;  // of the libgomp in use
    // What `#pragma omp parallel` compiles to: work(context) on up to `threads` members.
    void (*parallel)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
};

// Null while no libgomp is loaded. torch may be imported after us, so a miss is looked up again.
const OpenMP* find_openmp();

}  // namespace emocore
