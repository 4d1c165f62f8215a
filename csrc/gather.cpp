#include "gather.h"

#include <algorithm>
#include <cstring>

#include "crc32c.h"

namespace emocore {
namespace {

constexpr int64_t NEAR = 16384;  // bytes that are still in the nearest cache when they are checksummed

void copy(const Bytes& bytes, int64_t from, int64_t count, char* to) {
    if (bytes.stride == bytes.width) {
        std::memcpy(to, bytes.data + from, static_cast<size_t>(count));
        return;
    }
    for (int64_t row = from / bytes.width, at = from % bytes.width; count > 0; ++row, at = 0) {
        const int64_t run = std::min(count, bytes.width - at);
        std::memcpy(to, bytes.data + row * bytes.stride + at, static_cast<size_t>(run));
        to += run;
        count -= run;
    }
}

}  // namespace

uint32_t gather(const Bytes& bytes, int64_t from, int64_t count, char* to, uint32_t crc) {
    for (int64_t done = 0; done < count; done += NEAR) {
        const int64_t run = std::min(NEAR, count - done);
        copy(bytes, from + done, run, to + done);
        crc = crc32c(crc, to + done, static_cast<size_t>(run));
    }
    return crc;
}

}  // namespace emocore
