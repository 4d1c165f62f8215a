// Strided rows copied into consecutive memory and checksummed, in one pass over the cache.
#pragma once
#include <cstdint>
#include <vector>

namespace emocore {

// `rows` times `width` bytes, `stride` bytes from one row to the next.
struct Bytes {
    const char* data;
    int64_t rows, width, stride;
    int64_t count() const { return rows * width; }
};

// Where bytes [from, from + count) of the rows go.
struct Piece {
    int64_t from, count;
    char* to;
};

// Copies the pieces, which follow one another, on up to so many threads; returns the checksum `crc`
// continued by them.
uint32_t gather(const Bytes& bytes, const std::vector<Piece>& pieces, uint32_t crc, int threads);

}  // namespace emocore
