// CRC-32C (Castagnoli, reflected, inverted before and after), as iSCSI, ext4 and most object stores have it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emocore {

// Of a text whose beginning has the checksum `crc`, continued by these bytes; 0 is that of nothing.
uint32_t crc32c(uint32_t crc, const void* data, size_t bytes);

// The same by tables alone, for machines without the instruction.
uint32_t crc32c_portable(uint32_t crc, const void* data, size_t bytes);

}  // namespace emocore
