// The memory of a ring: slots of one size, page-aligned, allocated once.
#pragma once
#include <cstdint>
#include <vector>

namespace emocore {

struct Driver;

constexpr int NONE = -1;

// Which use of a slot is meant: it stays valid until the slot is given back.
struct Lease {
    int slot = NONE;
    uint64_t generation = 0;
    explicit operator bool() const { return slot != NONE; }
};

// Not thread-safe, but for `at`.
class Slots {
  public:
    Slots(int count, int64_t bytes);  // throws std::bad_alloc
    ~Slots();
    Slots(const Slots&) = delete;
    Slots& operator=(const Slots&) = delete;

    int count() const { return static_cast<int>(generations_.size()); }
    int free() const { return static_cast<int>(free_.size()); }
    int64_t bytes() const { return bytes_; }

    // Lets a GPU copy to it at the full rate of the link; throws DeviceError.
    void pin();

    Lease take();            // of one that is free; the last that was given back is the warmest
    void give(Lease lease);  // throws std::logic_error for a lease that has ended
    char* at(Lease lease) const { return memory_ + lease.slot * bytes_; }
    bool holds(Lease lease) const { return generations_[lease.slot] == lease.generation; }

  private:
    int64_t bytes_;
    char* memory_;
    const Driver* pinned_by_ = nullptr;
    std::vector<uint64_t> generations_;  // odd while leased
    std::vector<int> free_;
};

}  // namespace emocore
