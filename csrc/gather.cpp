#include "gather.h"

#include <algorithm>
#include <cstring>

#include "crc32c.h"
#include "threads.h"

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

uint32_t copy_checked(const Bytes& bytes, const Piece& piece, uint32_t crc) {
    for (int64_t done = 0; done < piece.count; done += NEAR) {
        const int64_t run = std::min(NEAR, piece.count - done);
        copy(bytes, piece.from + done, run, piece.to + done);
        crc = crc32c(crc, piece.to + done, static_cast<size_t>(run));
    }
    return crc;
}

}  // namespace

uint32_t gather(const Bytes& bytes, const std::vector<Piece>& pieces, uint32_t crc, int threads) {
    if (threads <= 1 || pieces.size() <= 1) {
        for (const Piece& piece : pieces) crc = copy_checked(bytes, piece, crc);
        return crc;
    }
    std::vector<uint32_t> sums(pieces.size());
    parallel(threads, static_cast<int64_t>(pieces.size()), [&](int, int64_t i) {
        sums[i] = copy_checked(bytes, pieces[i], 0);
    });
    for (size_t i = 0; i < pieces.size(); ++i)
        crc = crc32c_joined(crc, sums[i], static_cast<size_t>(pieces[i].count));
    return crc;
}

}  // namespace emocore
