// Bytes on a GPU brought to pinned host memory and checksummed, on a stream of their own.
#pragma once
#include <cstdint>
#include <vector>

#include "driver.h"

namespace emocore {

// For one thread at a time, on the device that was current when it was made.
class Fetch {
  public:
    Fetch();  // throws DeviceError, as all of it
    ~Fetch();
    Fetch(const Fetch&) = delete;
    Fetch& operator=(const Fetch&) = delete;

    bool here() const;  // whether its device is current

    // Copies wait for what `stream` has been given until now.
    void after(uint64_t stream);

    // Copies `count` bytes at the device's address `from`, and waits until they are there: both may be used
    // again. Returns the checksum `crc` continued by them; a piece is checksummed while the next one arrives.
    uint32_t copy(uint64_t from, int64_t count, char* to, uint32_t crc);

  private:
    void check(abi::Result result, const char* call) const;
    void* event(size_t index);
    void* current() const;

    const Driver& driver_;
    void *context_ = nullptr, *stream_ = nullptr;
    std::vector<void*> events_;  // one of what is ahead of the copy, and one for each of its pieces
};

}  // namespace emocore
