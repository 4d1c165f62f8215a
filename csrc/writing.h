// Whole writes at a place in a file, for threads that hold no GIL.
#pragma once
#include <cstdint>

namespace emocore {

// All of it at `offset`, through interruptions and short writes; 0, or the errno.
int write_all(int handle, const char* data, int64_t bytes, int64_t offset);

}  // namespace emocore
