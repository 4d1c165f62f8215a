#include "writing.h"

#include <unistd.h>

#include <cerrno>

namespace emocore {

int write_all(int handle, const char* data, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        const ssize_t written = pwrite(handle, data, static_cast<size_t>(bytes), offset);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) return errno;
        if (written == 0) return EIO;  // a file never takes nothing without saying why
        data += written;
        bytes -= written;
        offset += written;
    }
    return 0;
}

}  // namespace emocore
