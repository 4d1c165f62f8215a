// Strided rows copied into consecutive memory and checksummed, in one pass over the cache.
#pragma once
#include <cstdint>

namespace emocore {

// `rows` times `width` bytes, `stride` bytes from one row to the next.
struct Bytes {
    const char* data;
    int64_t rows, width, stride;
};

// Copies bytes [from, from + count) of the rows; returns the checksum `crc` continued by them. On the calling
// thread alone: it outpaces most disks, and a team that must wait for a busy core was measured slower.
uint32_t gather(const Bytes& bytes, int64_t from, int64_t count, char* to, uint32_t crc);

}  // namespace emocore
